"""The terms of a block's output: its input (the skip path), what the attention adds and what the MLP adds.

    out = x + a + m [+ e],      a = Attn(x), m = MLP(x + a)      (arXiv 2603.00425, figure 1)

`e` is what a steering adapter adds at the block's output. Post-MLP steering edits `m`, pre-MLP steering `a`,
post-block steering `out`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from peft_steer.sites import Block, site_module
from peft_steer.utils.errors import UsageError


TERMS = ("skip", "attention", "mlp", "edit")
_TOLERANCE = 0.03  # for `|e| / |out|` in the base: half precision rounds the sums


class Terms:
    """Records the terms of every block while a model runs.

    Args:
        blocks: The model's blocks.
    """

    def __init__(self, blocks: list[Block]):
        self.blocks = blocks
        self._values: list[list[torch.Tensor]] = [[] for _ in blocks]

    @contextmanager
    def recording(self, inputs: list[torch.Tensor] | None = None) -> Iterator[None]:
        """Records while the context lasts.

        Args:
            inputs: What each block reads, in place of the output of the block before it.
        """
        handles = []
        for i, block in enumerate(self.blocks):
            self._values[i] = [torch.empty(0)] * 4
            modules = (site_module(block, "attention")[1], site_module(block, "mlp")[1], block.module)
            for position, module in enumerate(modules, start=1):
                handles.append(module.register_forward_hook(self._keep(i, position)))
            given = None if inputs is None else inputs[i]
            handles.append(block.module.register_forward_pre_hook(self._enter(i, given)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def inputs(self) -> list[torch.Tensor]:
        """The input of every block in the last forward pass."""
        return [values[0] for values in self._values]

    def of(self, i: int, present: torch.Tensor) -> torch.Tensor:
        """The terms of block `i` in the last forward pass, at the tokens where `present`, `(rows, tokens)`, is true:
        float64 of shape `(4, n, d)`, in the order of `TERMS`."""
        keep = present.flatten()  # (some models flatten rows and tokens inside a block)
        x, a, m, out = (value.reshape(-1, value.shape[-1])[keep].double() for value in self._values[i])
        return torch.stack([x, a, m, out - (x + a + m)])

    def check_sums(self, present: torch.Tensor) -> None:
        """Raises `UsageError` unless every block's output is the sum of its input, its attention and its MLP."""
        for i, block in enumerate(self.blocks):
            terms = self.of(i, present)
            error = (terms[3].norm() / terms.sum(0).norm()).item()
            if not error < _TOLERANCE:
                raise UsageError(
                    f"the output of block {block.name!r} ({type(block.module).__name__}) is not its input plus its "
                    f"attention's output plus its MLP's (it differs by {error:.1%}), as in post-norm or scaled "
                    "blocks: it cannot be split into their shares"
                )

    def _keep(self, i: int, position: int) -> Callable:
        def hook(module, args, output):
            self._values[i][position] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    def _enter(self, i: int, given: torch.Tensor | None) -> Callable:
        def hook(module, args):
            self._values[i][0] = args[0] if given is None else given
            return (self._values[i][0], *args[1:])

        return hook
