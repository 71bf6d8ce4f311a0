"""The ReFT family (arXiv 2404.03592), with the names and the letters of the authors' library `pyreft`.

`f` is the identity unless an activation is given. LoReFT and DiReFT have orthonormal rows in `R`, the other two an
unconstrained `W2` in its place. Each starts at `dh = 0` exactly, in every dtype.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .base import Affine, Device, Dtype, Intervention, at_least_float32
from .low_rank import ACTIVATIONS, Factors, LowRankEdit
from .low_rank_form import LowRankForm, low_rank_form
from .prepared import Tensors


class Loreft(LowRankEdit):
    """`dh = R^T (W h + b - R h)` with orthonormal rows of `R` (LoReFT, arXiv 2404.03592, equation 2).

    `W`: `(r, d)`, `b`: `(r,)`, `R`: `(r, d)`. What is stored and trained for `R` is a matrix `V` of its shape, and
    `R = L^-1 V` with `L L^T = V V^T` (Cholesky, in float32 or better): the rows of `R` are orthonormal to rounding
    whatever the optimizer, a cast or a file did to `V`.

    At the start `W = R`, so `dh = 0`. The rows of `R` then have disjoint random supports and entries `+-2^-k`: such a
    matrix is orthonormal exactly, in every dtype, so that casting the adapter does not disturb `dh = 0` either.
    """

    def __init__(self, d: int, r: int, init_weights: bool = True, device: Device = None, dtype: Dtype = None):
        super().__init__()
        self.V = nn.Parameter(torch.empty(r, d, device=device, dtype=dtype))
        self.W = nn.Parameter(torch.empty(r, d, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.empty(r, device=device, dtype=dtype))
        self.reset_parameters(init_weights)

    @torch.no_grad()
    def reset_parameters(self, init_weights: bool = True) -> None:
        r, d = self.V.shape
        support = 4 ** int(math.log(d // r, 4))  # the square root of a power of 4 is exact
        columns = torch.randperm(d, device=self.V.device)[: r * support]
        rows = torch.arange(r, device=self.V.device).repeat_interleave(support)
        signs = torch.randint(0, 2, (r * support,), device=self.V.device) * 2 - 1
        self.V.zero_()
        self.V[rows, columns] = (signs / math.sqrt(support)).to(self.V.dtype)
        self.W.copy_(self.V)
        self.b.zero_()
        if not init_weights:
            self.W.add_(torch.randn_like(self.W), alpha=d**-0.5)
            nn.init.normal_(self.b)

    @property
    def R(self) -> torch.Tensor:
        """The orthonormal rows, `(r, d)`, float32 (float64 if the parameters are)."""
        V = at_least_float32(self.V)
        with torch.autocast(V.device.type, enabled=False):
            rows: torch.Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(V @ V.t()), V, upper=False)
            return rows

    @R.setter
    def R(self, rows: torch.Tensor) -> None:
        rows = rows.detach().to(self.V)
        gram = at_least_float32(rows) @ at_least_float32(rows).t()
        if rows.shape != self.V.shape or (gram - torch.eye(len(rows), device=gram.device)).abs().max() > 1e-2:
            raise ValueError(f"`R` must have orthonormal rows, in the shape {tuple(self.V.shape)}.")
        with torch.no_grad():
            self.V.copy_(rows)

    def delta(self, h: torch.Tensor) -> torch.Tensor:
        R = self.R.to(h.dtype)
        return F.linear(F.linear(h, self.W.to(h.dtype), self.b.to(h.dtype)) - F.linear(h, R), R.t())

    def factors(self, dtype: torch.dtype) -> Factors:
        R = self.R
        return self.W.to(R.dtype) - R, R.t(), self.b.to(R.dtype), None

    def affine(self) -> Affine:
        R = self.R
        return R.t() @ (self.W.to(R.dtype) - R), R.t() @ self.b.to(R.dtype)

    def low_rank(self, scale: float = 1.0) -> LowRankForm:
        R = self.R
        return low_rank_form(self.W.to(R.dtype) - R, R.t(), c=self.b, scale=scale)


class Direft(Loreft):
    """`dh = R^T f(W h + b)` with orthonormal rows of `R`, kept as [`Loreft`] keeps them.

    At the start `W = 0` and `b = 0`; every `f` here has `f(0) = 0`.
    """

    activations = tuple(ACTIVATIONS)

    @classmethod
    def check_config(cls, config: Any) -> None:
        if config.activation == "relu":
            raise ValueError(
                f"`activation='relu'` contradicts `kind={config.kind!r}`: it starts at `f(0)`, where relu's gradient "
                "is zero, and would never leave it. Choose another activation, or `kind='nodireft'`."
            )

    def __init__(self, *args: Any, activation: str | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.activation = activation

    @torch.no_grad()
    def reset_parameters(self, init_weights: bool = True) -> None:
        super().reset_parameters(init_weights)
        if init_weights:
            self.W.zero_()

    def delta(self, h: torch.Tensor) -> torch.Tensor:
        return F.linear(_f(self, h, self.W), self.R.to(h.dtype).t())

    def factors(self, dtype: torch.dtype) -> Factors:
        R = self.R
        return self.W.to(R.dtype), R.t(), self.b.to(R.dtype), None

    def affine(self) -> Affine:
        if self.activation:
            return None
        R = self.R
        return R.t() @ self.W.to(R.dtype), R.t() @ self.b.to(R.dtype)

    def low_rank(self, scale: float = 1.0) -> LowRankForm:
        return low_rank_form(self.W, self.R.t(), c=self.b, activations=self.activation, scale=scale)


class Nodireft(LowRankEdit):
    """`dh = W2^T f(W1 h + b)`: DiReFT without orthonormality, as its paper writes it.

    `W1`, `W2`: `(r, d)`, `b`: `(r,)`. At the start `W2 = 0`, `b = 0` and `W1` is Kaiming-uniform.
    """

    activations = tuple(ACTIVATIONS)

    def __init__(
        self,
        d: int,
        r: int,
        activation: str | None = None,
        init_weights: bool = True,
        device: Device = None,
        dtype: Dtype = None,
    ):
        super().__init__()
        self.activation = activation
        self.W1 = nn.Parameter(torch.empty(r, d, device=device, dtype=dtype))
        self.W2 = nn.Parameter(torch.empty(r, d, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.empty(r, device=device, dtype=dtype))
        self.reset_parameters(init_weights)

    def reset_parameters(self, init_weights: bool = True) -> None:
        nn.init.kaiming_uniform_(self.W1, a=math.sqrt(5))
        if init_weights:
            nn.init.zeros_(self.W2)
            nn.init.zeros_(self.b)
        else:
            nn.init.kaiming_uniform_(self.W2, a=math.sqrt(5))
            nn.init.normal_(self.b)

    def delta(self, h: torch.Tensor) -> torch.Tensor:
        return F.linear(_f(self, h, self.W1), self.W2.to(h.dtype).t())

    def factors(self, dtype: torch.dtype) -> Factors:
        return self.W1, self.W2.t(), self.b, None

    def affine(self) -> Affine:
        if self.activation:
            return None
        W2 = at_least_float32(self.W2)
        return W2.t() @ self.W1.to(W2.dtype), W2.t() @ self.b.to(W2.dtype)

    def low_rank(self, scale: float = 1.0) -> LowRankForm:
        return low_rank_form(self.W1, self.W2.t(), c=self.b, activations=self.activation, scale=scale)


class Noreft(Nodireft):
    """`dh = W2^T (f(W1 h + b) - W2 h)`: LoReFT without orthonormality. Parameters and start as [`Nodireft`]'s.

    With the identity as `f` it is the fused `W2^T ((W1 - W2) h + b)`; with another, plain autograd, which keeps `h`.
    """

    def delta(self, h: torch.Tensor) -> torch.Tensor:
        W2 = self.W2.to(h.dtype)
        return F.linear(_f(self, h, self.W1) - F.linear(h, W2), W2.t())

    def factors(self, dtype: torch.dtype) -> Factors:
        W2 = at_least_float32(self.W2)
        return self.W1.to(W2.dtype) - W2, W2.t(), self.b.to(W2.dtype), None

    def edit(self, h: torch.Tensor, scale: float) -> torch.Tensor:
        if self.activation is None:
            return super().edit(h, scale)
        return Intervention.edit(self, h, scale)

    def prepare(self, dtype: torch.dtype, scale: float) -> Tensors:
        if self.activation is None:
            return super().prepare(dtype, scale)
        return self.W1.to(dtype), self.W2.to(dtype), self.b.to(dtype)

    def infer(self, h: torch.Tensor, prepared: Tensors, scale: float) -> torch.Tensor:
        if self.activation is None:
            return super().infer(h, prepared, scale)
        W1, W2, b = prepared
        rows = h.reshape(-1, h.shape[-1])
        z = ACTIVATIONS[self.activation](torch.addmm(b, rows, W1.t()))
        z = torch.addmm(z, rows, W2.t(), alpha=-1)
        return torch.addmm(rows, z, W2, alpha=scale).view(h.shape)

    def affine(self) -> Affine:
        if self.activation:
            return None
        W2 = at_least_float32(self.W2)
        return W2.t() @ (self.W1.to(W2.dtype) - W2), W2.t() @ self.b.to(W2.dtype)

    def low_rank(self, scale: float = 1.0) -> LowRankForm:
        W1, W2 = at_least_float32(self.W1), at_least_float32(self.W2)
        if self.activation is None:
            return low_rank_form(W1 - W2, W2.t(), c=self.b, scale=scale)
        # `W2^T f(W1 h + b)` and `- W2^T W2 h`, side by side
        A, B, c = torch.cat([W1, W2]), torch.cat([W2, -W2]).t(), torch.cat([self.b, torch.zeros_like(self.b)])
        r = len(self.b)
        return low_rank_form(A, B, c=c, activations=(self.activation,) * r + (None,) * r, scale=scale)


def _f(edit: Direft | Nodireft, h: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    z = F.linear(h, W.to(h.dtype), edit.b.to(h.dtype))
    return ACTIVATIONS[edit.activation](z) if edit.activation else z
