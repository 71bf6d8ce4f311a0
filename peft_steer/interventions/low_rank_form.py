"""One form for every edit that acts on each token alone: `h + B f(A h + c) + v`, whatever its kind.

An inference engine that can run it runs them all, and different ones side by side.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class LowRankForm:
    """`h + B f(A h + c) + v`, with an `f` for each of the `r` units; everything float32, detached.

    Attributes:
        A: `(r, d)`. B: `(d, r)`. Rank 0 is a fixed vector.
        c: `(r,)`, or None if the kind has none. It is None too where every `f` is the identity: `B c` is in `v` then.
        v: `(d,)`, or None if the kind has none.
        activations: for each unit the name of its `f`, None for the identity; equal ones lie side by side.
    """

    A: torch.Tensor
    B: torch.Tensor
    c: torch.Tensor | None
    v: torch.Tensor | None
    activations: tuple[str | None, ...]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those of `A`, `B`, `c` and `v` that there are; which these are depends on the kind, not on the values."""
        found = {"A": self.A, "B": self.B, "c": self.c, "v": self.v}
        return {name: x for name, x in found.items() if x is not None and x.numel()}

    def delta(self, h: torch.Tensor, functions: dict[str, Callable[[torch.Tensor], torch.Tensor]]) -> torch.Tensor:
        """`B f(A h + c) + v`, given the functions by name."""
        z = F.linear(h, self.A, self.c)
        columns = [functions[name](x) if name else x for name, x in zip(self.activations, z.unbind(-1), strict=True)]
        return F.linear(torch.stack(columns, -1) if columns else z, self.B, self.v)


@torch.no_grad()
def low_rank_form(
    A: torch.Tensor,
    B: torch.Tensor,
    c: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    activations: str | tuple[str | None, ...] | None = None,
    scale: float = 1.0,
) -> LowRankForm:
    """The form of `h + scale * (B f(A h + c) + v)`, from tensors of any floating dtype.

    Args:
        A: `(r, d)`. B: `(d, r)`. c: `(r,)` or None. v: `(d,)` or None.
        activations: the name of `f`, None for the identity, or a tuple of them, one for each unit.
        scale: strength of the edit.
    """
    if not isinstance(activations, tuple):
        activations = (activations,) * len(A)
    A, B = A.detach().float(), B.detach().float()
    c, v = (x if x is None else x.detach().float() for x in (c, v))
    if c is not None and not any(activations):
        v, c = B @ c + (0 if v is None else v), None
    return LowRankForm(A.contiguous(), (scale * B).contiguous(), c, v if v is None else scale * v, activations)
