"""Edits of attention heads, where they lie side by side: at the input of the attention's output projection.

`z`, of width `H * head_dim`, has the heads' outputs one after the other. Head `i` is edited to
`z_i' = (1 + a_i) * z_i + v_i`, with vectors of `head_dim`; the methods differ in how `a` and `v` are trained.
"""

from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .base import Affine, Device, Dtype, EditConfig, Intervention
from .optimizer_hooks import Group, SteppedEdit, Update, refuse_flat
from .prepared import Tensors


class _EditHeads(torch.autograd.Function):
    """`z + scale * (a * z + v)`, computed in float32 or better, keeping `z` as it is for the gradient of `a`."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, a: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, a)
        ctx.scale = scale
        return _plain_edit(z, a, v, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, a = ctx.saved_tensors
        need_z, need_a, need_v, _ = ctx.needs_input_grad
        grad = grad_out.reshape(-1, a.numel()).to(a.dtype)
        grad_z = grad_a = grad_v = None
        if need_z:
            grad_z = torch.addcmul(grad, grad, a, value=ctx.scale).to(grad_out.dtype).view(grad_out.shape)
        if need_a:
            grad_a = (grad * z.reshape(grad.shape)).sum(0) * ctx.scale
        if need_v:
            grad_v = grad.sum(0) * ctx.scale
        return grad_z, grad_a, grad_v, None


def _plain_edit(z: torch.Tensor, a: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    return _scaled_edit(z, 1 + scale * a, scale * v)


def _scaled_edit(z: torch.Tensor, factor: torch.Tensor, summand: torch.Tensor) -> torch.Tensor:
    if z.dtype == factor.dtype:
        return torch.addcmul(summand, factor, z)
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return torch.addcmul(summand, factor, z.to(factor.dtype)).to(z.dtype)
    return torch.addcmul(summand, factor, z, out=torch.empty_like(z))  # rounded once, in one kernel


class HeadEdit(SteppedEdit):
    """`dz = a * z + v` for heads side by side in `z`, of width `H * head_dim`, with `a` and `v` made from `A` and `v`.

    `A`, `v`: `(H, head_dim)`, zero at the start, so `dz = 0`. They may be stored in any dtype: everything is computed
    in float32 or better, so that `1 + a` is not rounded to half precision.

    Args:
        num_heads: `H`. head_dim: the width of a head.
        group: shared by the edits of one adapter in one model.
    """

    has_rank = False
    edits_heads = True
    steps: torch.Tensor

    @classmethod
    def build(
        cls,
        config: EditConfig,
        width: int,
        rank: int,
        head_dim: int | None = None,
        group: Group | None = None,
        **kwargs: Any,
    ) -> Intervention:
        if head_dim is None:
            raise ValueError(f"`kind={config.kind!r}` edits attention heads, and their width is not known here.")
        settings = {"init_weights": config.init_weights, **cls.arguments(config), **kwargs}
        return cls(width // head_dim, head_dim, group, **settings)

    def __init__(
        self, num_heads: int, head_dim: int, group: Group | None = None, device: Device = None, dtype: Dtype = None
    ):
        super().__init__(group)
        self.A = nn.Parameter(torch.empty(num_heads, head_dim, device=device, dtype=dtype))
        self.v = nn.Parameter(torch.empty(num_heads, head_dim, device=device, dtype=dtype))
        # Optimizer steps seen. Part of the adapter's state: a resumed training goes on where it was.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))

    def reset_parameters(self, init_weights: bool = True) -> None:
        for p in (self.A, self.v):
            nn.init.zeros_(p) if init_weights else nn.init.normal_(p)

    def acting(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`a` and `v` as they act now, `(H, head_dim)`, float32 (float64 if the parameters are)."""
        raise NotImplementedError(f"{type(self).__name__} does not define acting().")

    def delta(self, h: torch.Tensor) -> torch.Tensor:
        a, v = (x.flatten() for x in self.acting())
        return torch.addcmul(v, a, h.to(a.dtype)).to(h.dtype)

    def edit(self, h: torch.Tensor, scale: float) -> torch.Tensor:
        if self.training:
            refuse_flat("A", self.A)
        a, v = (x.flatten() for x in self.acting())
        if torch.is_grad_enabled() and any(x.requires_grad for x in (h, a, v)):
            return cast(torch.Tensor, _EditHeads.apply(h, a, v, scale))  # type: ignore[no-untyped-call]  # torch's
        return _plain_edit(h, a, v, scale)

    def prepare(self, dtype: torch.dtype, scale: float) -> Tensors:
        a, v = self.acting()
        return (1 + scale * a).flatten(), (scale * v).flatten()

    def infer(self, h: torch.Tensor, prepared: Tensors, scale: float) -> torch.Tensor:
        return _scaled_edit(h, *prepared)

    def affine(self) -> Affine:
        training, self.training = self.training, False
        a, v = (x.flatten() for x in self.acting())
        self.training = training
        return torch.diag(a), v

    @staticmethod
    def after_step(edits: list[Any], update: Update) -> None:
        for edit in edits:
            edit.steps += 1
