"""What inference needs of an edit's parameters (casts, differences, projections), prepared once and kept.

It is kept until one of the tensors that it was made of changes, or the strength, the dtype or the mode. On a CPU a
change is seen by comparing bytes, whoever made it. On other devices it is seen by torch's version counter, by the
address of the data, and by counting optimizer steps, since fused optimizers do not move the version. A write into
`parameter.data` in place moves none of them there: call `model.eval()` after one.
"""

import ctypes
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook


Tensors = tuple[Any, ...]  # tensors, or None where the edit has none
_optimizer_steps = 0


def _count_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


class Prepared:
    """Tensors made of others, and what these were then."""

    def __init__(self, key: tuple[object, ...], sources: list[torch.Tensor], tensors: Tensors):
        self.key = key
        as_they_are = [x is None or any(x is source for source in sources) for x in tensors]
        # Without their graph: a view would refer to the parameter, which `torch.utils.swap_tensors` does not allow.
        self.tensors = tuple(x if same else x.data for x, same in zip(tensors, as_they_are, strict=True))
        self._derived = not all(as_they_are)  # parameters that are used as they are show changes by themselves
        # A second reference to the data keeps its address from being used again.
        self._stamps = [(x, x.data, self._stamp(x)) for x in sources]

    def is_of(self, key: tuple[object, ...], sources: list[torch.Tensor]) -> bool:
        """Whether nothing has changed."""
        if key != self.key or len(sources) != len(self._stamps):
            return False
        for x, (before, _, stamp) in zip(sources, self._stamps, strict=True):
            if x is not before or self._stamp(x) != stamp:
                return False
        return True

    def _stamp(self, x: torch.Tensor) -> tuple[object, ...]:
        if not self._derived:
            return x.data_ptr(), x.dtype
        if _bytes_are_near(x.device):
            return x.dtype, ctypes.string_at(x.data_ptr(), x.nbytes)
        return x.data_ptr(), x.dtype, x._version, _optimizer_steps


def reads_what_is_kept(h: torch.Tensor) -> bool:
    """Whether the present forward pass, on `h`, may use what is kept.

    Not in a graph that is compiled or captured, which has to read the parameters themselves; and not where parameters
    are gathered anew for every pass, at the same address (FSDP, DeepSpeed).
    """
    if type(h) is not torch.Tensor or torch.compiler.is_compiling():
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    if h.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return torch._C._functorch.maybe_current_level() is None


def can_be_watched(x: torch.Tensor, device: torch.device) -> bool:
    """Whether every change of `x` is seen, which is used on `device`."""
    if type(x) not in (nn.Parameter, torch.Tensor) or x.device != device:
        return False
    return x.is_contiguous() if _bytes_are_near(device) else not x.is_inference()


def _bytes_are_near(device: torch.device) -> bool:
    return device.type == "cpu"
