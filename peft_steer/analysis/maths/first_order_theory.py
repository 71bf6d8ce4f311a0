"""The first-order theory of one MLP: what a weight update does to its output, and what steering can do of that.

Notation (arXiv 2603.00425, first-order framework): `f(W, h)` is the MLP (a GLU: `W_d (act(W_g h) * W_u h)`) with the
hidden activations `m`, so that `f = W_d m`; `A(h) = df/dh`. Fine-tuning changes `W` by `dW`:

    f(W + dW, h) - f(W, h) = (df/dW) dW + remainder                    (weight update, first order)
    (df/dW) dW = (dW_d) m + [what dW_g and dW_u do to m, through W_d]
    f(W, h + dh) - f(W, h) = A(h) dh + remainder                       (pre-MLP steering, first order)

Post-MLP steering adds `dh` to `f` and can take any value for one token. Pre-MLP steering can only reach the column
space of `A(h)`. As `A(h)` is rarely singular but always ill-conditioned, that space is taken at several tolerances:
the span of the left singular vectors whose singular values are at least `tolerance` times the largest.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call, jvp, vmap

from peft_steer.utils.errors import UsageError

from .mlp import Mlp, plain_copy


TOLERANCES = (1e-1, 1e-2, 1e-3, 0.0)
_CHUNK = 256  # JVPs that are computed at once


@dataclass
class Update:
    """An MLP before and after fine-tuning, as float64 functions.

    Attributes:
        module: The base's MLP, with ordinary weights, in float64.
        weights: Its parameters `W`, by name.
        change: `dW`, by the same names.
        output: The names among them that belong to the linear layer that ends the MLP (`W_d` and its bias).
        takes_residual: See [`Mlp`].
    """

    module: nn.Module
    weights: dict[str, torch.Tensor]
    change: dict[str, torch.Tensor]
    output: tuple[str, ...]
    takes_residual: bool

    @classmethod
    def between(cls, base: Mlp, tuned: Mlp) -> "Update":
        """The change from `base` to `tuned`, MLPs of the same block.

        Raises:
            UsageError: If their weights do not correspond.
        """
        module, other = plain_copy(base.module), plain_copy(tuned.module)
        weights = {name: p.detach() for name, p in module.named_parameters()}
        after = {name: p.detach().to(weights[name].device) for name, p in other.named_parameters() if name in weights}
        shapes = [{name: p.shape for name, p in m.named_parameters()} for m in (module, other)]
        if shapes[0] != shapes[1]:
            raise UsageError(f"the MLPs of base and tuned differ: {shapes[0]} and {shapes[1]}")
        change = {name: after[name] - p for name, p in weights.items()}
        output = tuple(name for name in weights if name.startswith(f"{base.output}."))
        return cls(module, weights, change, output, base.takes_residual)

    def __call__(self, h: torch.Tensor, weights: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """`f(W, h)`, of shape `(..., d)`, with the base's weights or with others."""
        arguments = (h, torch.zeros_like(h)) if self.takes_residual else (h,)
        return functional_call(self.module, weights or self.weights, arguments)

    def tuned(self, h: torch.Tensor) -> torch.Tensor:
        """`f(W + dW, h)`."""
        return self(h, {name: p + self.change[name] for name, p in self.weights.items()})

    def directional(self, h: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
        """`(df/dW) dW` for the weights of these names, of shape `(..., d)`: an exact JVP.

        Raises:
            UsageError: If an activation has no derivative in forward mode (Bloom's).
        """
        tangent = {k: self.change[k] if k in names else torch.zeros_like(p) for k, p in self.weights.items()}
        try:
            return jvp(lambda weights: self(h, weights), (self.weights,), (tangent,))[1]
        except RuntimeError as error:
            if "setup_context" not in str(error):
                raise
            raise UsageError(
                f"{type(self.module).__name__} computes its activation by its own autograd function, which has no "
                "derivative in forward mode"
            ) from error

    def jacobian(self, h: torch.Tensor) -> torch.Tensor:
        """`A(h) = df/dh`, of shape `(d, d)`: the exact JVPs along the axes of `h`, `(d,)`."""
        axes = torch.eye(len(h), dtype=h.dtype, device=h.device)
        return vmap(lambda axis: jvp(self, (h,), (axis,))[1], chunk_size=_CHUNK, out_dims=1)(axes)

    def finite_difference_error(self, h: torch.Tensor, step: float = 1e-5) -> float:
        """Relative distance of `(df/dW) dW` to a central difference with that step: a check of the derivative."""
        exact = self.directional(h, tuple(self.weights))
        ahead, behind = (
            self(h, {name: p + sign * step * self.change[name] for name, p in self.weights.items()})
            for sign in (1.0, -1.0)
        )
        return _ratio((ahead - behind) / (2 * step) - exact, exact)


def match(update: Update, h: torch.Tensor, tolerances: tuple[float, ...] = TOLERANCES) -> dict:
    """What steering can do of a weight update, for one token.

    Args:
        update: The MLP and its change.
        h: The MLP's input, `(d,)`, float64.
        tolerances: Relative to the largest singular value of `A(h)`; 0 stands for float64's own precision.

    Returns:
        Relative norms (no units). `remainder`: of the weight update's first-order expansion, relative to the exact
        shift `s`. `down_share`: `|(dW_d) m|` relative to `|(df/dW) dW|`. `shift`: `|s| / |f|`, the size of the `dh`
        with which post-MLP steering reaches `s` exactly. `finite_difference`: see [`Update`]. `spaces`: for each
        tolerance its `rank`; the parts of `(dW_d) m` (`outside_down`), of the rest (`outside_inner`) and of the whole
        (`outside`) that lie outside the column space; the size `|dh| / |h|` of the best pre-MLP `dh` (the
        least-squares solution of `A dh = (df/dW) dW` in that space); and `reached`, the relative error
        `|f(W, h + dh) - f(W, h) - s| / |s|` that it has in the MLP as it is, beyond first order.
    """
    y = update(h)
    shift = update.tuned(h) - y
    down = update.directional(h, update.output)
    inner = update.directional(h, tuple(name for name in update.weights if name not in update.output))
    first = down + inner
    A = update.jacobian(h)
    U, S, Vh = torch.linalg.svd(A)
    spaces = []
    for tolerance in tolerances:
        rank = int((S[0] * max(tolerance, len(h) * torch.finfo(S.dtype).eps) < S).sum())
        basis = U[:, :rank]
        dh = Vh[:rank].t() @ ((basis.t() @ first) / S[:rank])
        spaces.append(
            {
                "tolerance": tolerance,
                "rank": rank,
                "outside_down": _outside(down, basis),
                "outside_inner": _outside(inner, basis),
                "outside": _outside(first, basis),
                "size": _ratio(dh, h),
                "reached": _ratio(update(h + dh) - y - shift, shift),
            }
        )
    return {
        "remainder": _ratio(shift - first, shift),
        "down_share": _ratio(down, first),
        "shift": _ratio(shift, y),
        "finite_difference": update.finite_difference_error(h),
        "spaces": spaces,
    }


def _outside(x: torch.Tensor, basis: torch.Tensor) -> float:
    return _ratio(x - basis @ (basis.t() @ x), x)


def _ratio(a: torch.Tensor, b: torch.Tensor) -> float:
    """`|a| / |b|`; 0 where both are zero."""
    numerator, denominator = a.norm().item(), b.norm().item()
    return 0.0 if numerator == 0 else numerator / denominator if denominator else float("inf")
