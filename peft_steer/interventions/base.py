"""What every intervention is: an equation for `dh`, and how it is added to a hidden state.

Notation (arXiv 2603.00425, section 3): a hidden state `h` of width `d` is replaced by `h + scale * dh`. Every
intervention is called as `edit(h, scale)` and returns the steered state; `edit.delta(h)` is the bare equation for
`dh`. Parameters may have another floating dtype than `h`: they are cast to `h`'s on use, never the other way round, so
no copy of `h` is made.
"""

import torch

from .low_rank_form import LowRankForm
from .precision import KeepsPrecision


class Intervention(KeepsPrecision):
    """Base class: `delta(h)` is the equation; `forward` adds it to `h`.

    Subclasses implement `delta`, `reset_parameters` and, where there is something to gain, `forward`.
    """

    def delta(self, h: torch.Tensor) -> torch.Tensor:
        """`dh`, broadcastable to `h` of shape `(..., d)` and in its dtype."""
        raise NotImplementedError(f"{type(self).__name__} does not define delta(h).")

    def forward(self, h: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """`h + scale * dh`, shape `(..., d)`, in the dtype of `h`."""
        return torch.add(h, self.delta(h), alpha=scale)

    def affine(self) -> tuple[torch.Tensor | None, torch.Tensor | None] | None:
        """`(M, v)` with `dh = M h + v`, shapes `(d, d)` and `(d,)` in float32 or float64 (None stands for zero), or
        None if the edit is no affine function of `h`."""
        return None

    def low_rank(self, scale: float = 1.0) -> LowRankForm | None:
        """The edit with `scale * dh` in the form that engines run, or None if it has none (edits of heads)."""
        return None


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
