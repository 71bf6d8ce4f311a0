"""The paper's equations (arXiv 2603.00425, section 3): a fixed vector, and a low-rank edit, linear or nonlinear."""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN

from .base import Affine, Device, Dtype, Intervention, at_least_float32
from .low_rank_form import LowRankForm, low_rank_form
from .prepared import Tensors


# `W_down` (r, d), `W_up` (d, r), `c` (r,) and `b` (d,)
Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]
ACTIVATIONS = {name: ACT2FN[name] for name in ("silu", "relu", "gelu", "tanh")}


def _activation_backward(name: str | None, grad: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    aten: Any = torch.ops.aten
    if name is None:
        return grad
    backward = {
        "silu": lambda: aten.silu_backward(grad, z),
        "relu": lambda: aten.threshold_backward(grad, z, 0),
        "gelu": lambda: aten.gelu_backward(grad, z),
        "tanh": lambda: aten.tanh_backward(grad, torch.tanh(z)),
    }
    return cast(torch.Tensor, backward[name]())


def _cast(dtype: torch.dtype, *tensors: Any) -> list[Any]:
    return [x if x is None or x.dtype == dtype else x.to(dtype) for x in tensors]


def _plain_edit(
    h: torch.Tensor,
    W_down: torch.Tensor,
    W_up: torch.Tensor,
    c: torch.Tensor | None,
    b: torch.Tensor | None,
    scale: float,
    activation: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The edit, and the tensor of width `r` that its derivative needs."""
    rows = h.reshape(-1, h.shape[-1])
    z = torch.mm(rows, W_down.t()) if c is None else torch.addmm(c, rows, W_down.t())
    a = ACTIVATIONS[activation](z) if activation else z
    out = torch.addmm(rows, a, W_up.t(), alpha=scale)
    if b is not None:
        out = out.add_(b, alpha=scale)
    return out.view(h.shape), z.view(*h.shape[:-1], len(W_down))


class _LowRankEdit(torch.autograd.Function):
    """`out = h + scale * (W_up act(W_down h + c) + b)`, keeping `out` for backward instead of `h`.

    A forward hook runs outside the block's gradient checkpoint. `h`, kept for backward, would be kept for this edit
    alone; `out` is the input of the next block, which keeps it anyway. `W_down`'s gradient needs `h` only in the
    product `gz^T h`, and with `h = out - scale * (W_up a + b)` that is `gz^T out` minus terms of size `r x r`: `h` is
    never rebuilt.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: torch.Tensor,
        W_down: torch.Tensor,
        W_up: torch.Tensor,
        c: torch.Tensor | None,
        b: torch.Tensor | None,
        scale: float,
        activation: str | None,
    ) -> torch.Tensor:
        down, up, inner, outer = _cast(h.dtype, W_down, W_up, c, b)
        out, z = _plain_edit(h, down, up, inner, outer, scale, activation)
        ctx.save_for_backward(out, z, W_down, W_up, b)
        ctx.scale, ctx.activation = scale, activation
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        out, z, W_down, W_up, b = ctx.saved_tensors
        scale, activation, dtype = ctx.scale, ctx.activation, out.dtype
        need_h, need_down, need_up, need_c, need_b = ctx.needs_input_grad[:5]
        shape = grad_out.shape
        grad_out, out, z = (x.reshape(-1, x.shape[-1]) for x in (grad_out, out, z))
        a = ACTIVATIONS[activation](z) if activation else z

        grad_h = grad_down = grad_up = grad_c = grad_b = None
        if need_b:
            grad_b = grad_out.sum(0).to(b.dtype) * scale
        if need_up:
            grad_up = (grad_out.t() @ a).to(W_up.dtype) * scale
        if need_h or need_down or need_c:
            grad_z = _activation_backward(activation, (grad_out @ W_up.to(dtype)) * scale, z)
            if need_h:
                grad_h = torch.addmm(grad_out, grad_z, W_down.to(dtype)).view(shape)
            sum_z = grad_z.sum(0).to(W_down.dtype)
            if need_c:
                grad_c = sum_z
            if need_down:
                # the corrections in the parameters' precision
                steered = (grad_z.t() @ a).to(W_up.dtype) @ W_up.t()
                if b is not None:
                    steered = steered + torch.outer(sum_z, b)
                grad_down = (grad_z.t() @ out).to(W_down.dtype) - scale * steered
        return grad_h, grad_down, grad_up, grad_c, grad_b, None, None


def low_rank_edit(
    h: torch.Tensor,
    W_down: torch.Tensor,
    W_up: torch.Tensor,
    c: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    scale: float = 1.0,
    activation: str | None = None,
) -> torch.Tensor:
    """`h + scale * (W_up act(W_down h + c) + b)`, fused; differentiable once.

    Args:
        h: hidden states, `(..., d)`, any floating dtype.
        W_down: `(r, d)`. W_up: `(d, r)`. c: `(r,)` or None. b: `(d,)` or None. All of one floating dtype.
        scale: strength of the edit.
        activation: a key of `ACTIVATIONS`, or None for the identity.

    Returns:
        `(..., d)`, in the dtype of `h`.
    """
    if torch.is_autocast_enabled(h.device.type):  # it would return another dtype than the base model expects
        with torch.autocast(h.device.type, enabled=False):
            return low_rank_edit(h, W_down, W_up, c, b, scale, activation)
    weights = (W_down, W_up, c, b)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (h, *weights)):
        out = _LowRankEdit.apply(h, *weights, scale, activation)  # type: ignore[no-untyped-call]  # torch's
        return cast(torch.Tensor, out)
    down, up, inner, outer = _cast(h.dtype, *weights)
    return _plain_edit(h, down, up, inner, outer, scale, activation)[0]


class FixedVector(Intervention):
    """`dh = v` (paper, section 3: fixed steering vector). `v`: `(d,)`, zero at the start."""

    has_rank = False

    def __init__(self, d: int, init_weights: bool = True, device: Device = None, dtype: Dtype = None):
        super().__init__()
        self.v = nn.Parameter(torch.empty(d, device=device, dtype=dtype))
        self.reset_parameters(init_weights)

    def reset_parameters(self, init_weights: bool = True) -> None:
        if init_weights:
            nn.init.zeros_(self.v)
        else:
            nn.init.normal_(self.v)

    def delta(self, h: torch.Tensor) -> torch.Tensor:
        return self.v.to(h.dtype)

    def prepare(self, dtype: torch.dtype, scale: float) -> Tensors:
        return (self.v.to(dtype),)

    def infer(self, h: torch.Tensor, prepared: Tensors, scale: float) -> torch.Tensor:
        return torch.add(h, prepared[0], alpha=scale)

    def affine(self) -> Affine:
        return None, at_least_float32(self.v)

    def low_rank(self, scale: float = 1.0) -> LowRankForm:
        d = len(self.v)
        return low_rank_form(self.v.new_empty(0, d), self.v.new_empty(d, 0), v=self.v, scale=scale)


class LowRankEdit(Intervention):
    """Any edit `dh = W_up act(W_down h + c) + b`; a subclass says what these are."""

    activation: str | None = None

    def factors(
        self, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """`W_down`, `W_up`, `c` and `b`, of one dtype, for hidden states of the given one."""
        raise NotImplementedError(f"{type(self).__name__} does not define factors(dtype).")

    def edit(self, h: torch.Tensor, scale: float) -> torch.Tensor:
        W_down, W_up, c, b = self.factors(h.dtype)
        return low_rank_edit(h, W_down, W_up, c=c, b=b, scale=scale, activation=self.activation)

    def prepare(self, dtype: torch.dtype, scale: float) -> Tensors:
        W_down, W_up, c, b = _cast(dtype, *self.factors(dtype))
        if b is None:
            return W_down, W_up, c
        # `b` as a column of `W_up`, for a row of `W_down h + c` that is always 1: no kernel of its own
        c = W_down.new_zeros(len(W_down)) if c is None else c
        return (
            torch.cat([W_down, torch.zeros_like(W_down[:1])]),
            torch.cat([W_up, b[:, None]], dim=1),
            torch.cat([c, torch.ones_like(c[:1])]),
        )

    def infer(self, h: torch.Tensor, prepared: Tensors, scale: float) -> torch.Tensor:
        W_down, W_up, c = prepared
        return _plain_edit(h, W_down, W_up, c, None, scale, self.activation)[0]


class LowRank(LowRankEdit):
    """`dh = W_up act(W_down h) + b`: linear without `activation`, nonlinear with one (paper, section 3).

    `W_down`: `(r, d)`, `W_up`: `(d, r)`, optional `b`: `(d,)`. At the start `W_up = 0`, `b = 0` and `W_down` is
    Kaiming-uniform times 1e-3 (paper, appendix on hyperparameters), so `dh = 0`.
    """

    @classmethod
    def arguments(cls, config: Any) -> dict[str, Any]:
        return {"activation": config.activation, "use_bias": config.use_bias}

    def __init__(
        self,
        d: int,
        r: int,
        activation: str | None = None,
        use_bias: bool = False,
        init_weights: bool = True,
        device: Device = None,
        dtype: Dtype = None,
    ):
        super().__init__()
        self.activation = activation
        self.W_down = nn.Parameter(torch.empty(r, d, device=device, dtype=dtype))
        self.W_up = nn.Parameter(torch.empty(d, r, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.empty(d, device=device, dtype=dtype)) if use_bias else None
        self.reset_parameters(init_weights)

    def reset_parameters(self, init_weights: bool = True) -> None:
        nn.init.kaiming_uniform_(self.W_down, a=math.sqrt(5))
        if init_weights:
            with torch.no_grad():
                self.W_down.mul_(1e-3)
            nn.init.zeros_(self.W_up)
        else:
            nn.init.kaiming_uniform_(self.W_up, a=math.sqrt(5))
        if self.b is not None:
            nn.init.zeros_(self.b) if init_weights else nn.init.normal_(self.b)

    @property
    def W_read(self) -> torch.Tensor:
        """The directions that the edit reads, `(r, d)`: `W_down`, unless a subclass constrains it."""
        return self.W_down

    def delta(self, h: torch.Tensor) -> torch.Tensor:
        a = F.linear(h, self.W_read.to(h.dtype))
        if self.activation:
            a = ACTIVATIONS[self.activation](a)
        return F.linear(a, self.W_up.to(h.dtype), None if self.b is None else self.b.to(h.dtype))

    def factors(self, dtype: torch.dtype) -> Factors:
        return self.W_read, self.W_up, None, self.b

    def affine(self) -> Affine:
        if self.activation:
            return None
        M = at_least_float32(self.W_up) @ at_least_float32(self.W_read)
        return M, None if self.b is None else at_least_float32(self.b)

    def low_rank(self, scale: float = 1.0) -> LowRankForm:
        return low_rank_form(self.W_read, self.W_up, v=self.b, activations=self.activation, scale=scale)


class Linear(LowRank):
    """`dh = W_up W_down h + b`; `b` only with `use_bias`."""

    has_bias = True


class Nonlinear(LowRank):
    """`dh = W_up act(W_down h)`."""

    activations = tuple(ACTIVATIONS)
    default_activation = "silu"
