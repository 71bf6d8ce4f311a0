"""Edits of attention heads, where they lie side by side: at the input of the attention's output projection.

`z`, of width `H * head_dim`, has the heads' outputs one after the other. Head `i` is edited to
`z_i' = (1 + a_i) * z_i + v_i`, with vectors of `head_dim`; the methods differ in how `a` and `v` are trained.
"""

import logging

import torch
from peft import PeftConfig
from torch import nn
from torch.autograd.function import once_differentiable

from .interventions import at_least_float32
from .stepping import Group, SteppedEdit, add_gradient, refuse_flat, whole


logger = logging.getLogger(__name__)


class _EditHeads(torch.autograd.Function):
    """`z + scale * (a * z + v)`, computed in float32 or better, keeping `z` as it is for the gradient of `a`."""

    @staticmethod
    def forward(ctx, z, a, v, scale):
        ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, a)
        ctx.scale = scale
        return _plain_edit(z, a, v, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
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
    x = z.to(a.dtype)
    return torch.add(x, torch.addcmul(v, a, x), alpha=scale).to(z.dtype)


class HeadEdit(SteppedEdit):
    """`dz = a * z + v` for heads side by side in `z`, of width `H * head_dim`, with `a` and `v` made from `A` and `v`.

    `A`, `v`: `(H, head_dim)`, zero at the start, so `dz = 0`. They may be stored in any dtype: everything is computed
    in float32 or better, so that `1 + a` is not rounded to half precision.

    Args:
        num_heads: `H`. head_dim: the width of a head.
        group: shared by the edits of one adapter in one model.
    """

    def __init__(self, num_heads: int, head_dim: int, group: Group | None = None, device=None, dtype=None):
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

    def forward(self, h: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        if self.training:
            refuse_flat("A", self.A)
        with torch.autocast(h.device.type, enabled=False):
            a, v = (x.flatten() for x in self.acting())
            if torch.is_grad_enabled() and any(x.requires_grad for x in (h, a, v)):
                return _EditHeads.apply(h, a, v, scale)
            return _plain_edit(h, a, v, scale)

    def affine(self):
        training, self.training = self.training, False
        a, v = (x.flatten() for x in self.acting())
        self.training = training
        return torch.diag(a), v

    @staticmethod
    def after_step(edits, optimizer) -> None:
        for edit in edits:
            edit.steps += 1


class Lofit(HeadEdit):
    """LoFiT (arXiv 2406.01563). First `A` and `v` of all heads are trained, with `l1_lambda * sum |A|` added to the
    loss. After `selection_step` optimizer steps the `num_heads` heads with the largest L2 norm of `A` are chosen, over
    all layers; of equals, those in lower layers, with lower numbers. `A` and `v` return to zero, with what the
    optimizer remembers of them, and from then on only the chosen heads' `v` are trained.

    The buffer `selected`, `(H,)`, says which heads may act. It is saved with the adapter, as the number of steps is.

    Args:
        chosen: how many heads are chosen; None for a tenth.
        selection_step, l1_lambda: as above.
        args, kwargs: those of [`HeadEdit`].
    """

    def __init__(
        self, *args, chosen: int | None, selection_step: int, l1_lambda: float, init_weights: bool = True, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.chosen, self.selection_step, self.l1_lambda = chosen, selection_step, l1_lambda
        self.register_buffer("selected", torch.ones(len(self.A), dtype=torch.bool, device=self.steps.device))
        self.reset_parameters(init_weights)

    def acting(self):
        # By multiplication, not by a branch: every parameter has a gradient in both stages, which DDP insists on, and
        # the stage need not be read from the device.
        first = self.steps < self.selection_step
        return at_least_float32(self.A) * first, at_least_float32(self.v) * self.selected[:, None]

    @staticmethod
    def before_step(edits) -> None:
        if edits[0].steps.item() < edits[0].selection_step:
            for edit in edits:
                add_gradient(edit.A, edit.l1_lambda * edit.A.sign())

    @staticmethod
    def after_step(edits, optimizer) -> None:
        HeadEdit.after_step(edits, optimizer)
        if edits[0].steps.item() == edits[0].selection_step:
            _select(edits, optimizer)


def _select(edits: list[Lofit], optimizer: torch.optim.Optimizer) -> None:
    norms = torch.cat([at_least_float32(whole(edit.A)).norm(dim=1) for edit in edits])
    if not norms.isfinite().all():
        raise RuntimeError("LoFiT cannot choose heads: `A` is not finite. Lower the learning rate.")
    count = edits[0].chosen or max(1, len(norms) // 10)
    chosen = torch.zeros_like(norms, dtype=torch.bool)
    chosen[norms.sort(descending=True, stable=True).indices[:count]] = True
    for edit, selected in zip(edits, chosen.split([len(edit.A) for edit in edits]), strict=True):
        edit.selected.copy_(selected)
        for p in (edit.A, edit.v):
            p.zero_()
            optimizer.state.pop(p, None)
    logger.info(
        "LoFiT chose %d of %d heads: %s",
        count,
        len(norms),
        [(edit.place, head) for edit in edits for head in edit.selected.nonzero().flatten().tolist()],
    )


def warn_before_choice(config: PeftConfig, adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`adapter`, the tensors to be saved; logs it if it is LoFiT's and has not chosen its heads yet."""
    steps = max((int(x) for key, x in adapter.items() if key.endswith(".steps")), default=0)
    if config.kind == "lofit" and steps < config.selection_step:
        logger.warning(
            "LoFiT's heads are not chosen yet: %d of `selection_step=%d` optimizer steps are done, and the saved "
            "adapter edits all heads. Train longer, or lower `selection_step`.",
            steps,
            config.selection_step,
        )
    return adapter
