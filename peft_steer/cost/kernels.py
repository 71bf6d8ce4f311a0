"""How many kernels a forward pass runs: exact, and the same on every machine."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


# What computes nothing, apart from the views that their schemas mark.
_NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "detach", "_local_scalar_dense")


class CountKernels(TorchDispatchMode):
    """Counts the aten calls that are not views while it is entered; `counts` has them by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in _NO_KERNEL:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def kernels_of_a_token(model: torch.nn.Module) -> int:
    """Kernels of a forward pass on one token in evaluation, where all that is kept between passes is prepared."""
    training = model.training
    ids = torch.ones(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    token = {"input_ids": ids, "use_cache": False}
    model.eval()
    try:
        with torch.no_grad():
            model(**token)
            with CountKernels() as count:
                model(**token)
    finally:
        model.train(training)
    return sum(count.counts.values())
