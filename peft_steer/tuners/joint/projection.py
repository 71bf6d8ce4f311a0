"""Keeping what an edit reads orthogonal to what LoRA writes: the projection, and when it is applied.

`B`, of shape (d, r_lora), is `lora_B` of the linear layer that ends a block's MLP: LoRA writes into the span of its
columns. `W_down`, of shape (r, d), holds the directions that the block's edit reads. The projection onto what is
orthogonal to `B` is `P(W) = W - (W B)(B^T B)^-1 B^T` (arXiv 2603.00425, joint adaptation).
"""

from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, distribute_tensor

from peft_steer.interventions.low_rank import Factors, LowRank
from peft_steer.interventions.optimizer_hooks import SteppedEdit, Update, refuse_flat, whole


# Of the correlation matrix of B's columns. Half its square root bounds the overlap that is left in a direction in
# which B is nearly singular: float32, with its error of 1e-7, would leave 1e-4 there. Hence float64.
_RIDGE = 1e-12
_SATISFIED = 5e-6  # overlap below which a matrix is left as it is, bit for bit


def _accurate(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)  # MPS has no float64


def _coefficients(W: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`M = (B^T B)^-1`, with a ridge and columns of any length, and `C = W B M`; zero for columns of zeros."""
    norms = B.norm(dim=0)
    inverse = torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(B.dtype).tiny), 0)
    unit = B * inverse
    gram = unit.t() @ unit
    ridge = _RIDGE if B.dtype == torch.float64 else 1e-6
    gram = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, _ = torch.linalg.cholesky_ex(gram)
    M = inverse[:, None] * torch.cholesky_inverse(factor) * inverse
    return M, (W @ B) @ M


class _Project(torch.autograd.Function):
    """`P(W)`, keeping no more than its two arguments and matrices of width `r_lora`."""

    @staticmethod
    def forward(ctx: Any, W: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        W64, B64 = _accurate(W), _accurate(B)
        M, C = _coefficients(W64, B64)
        ctx.save_for_backward(W, B, M, C)
        return (W64 - C @ B64.t()).to(torch.promote_types(W.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        W, B, M, C = ctx.saved_tensors
        W64, B64, G = _accurate(W), _accurate(B), _accurate(grad)
        H = (G @ B64) @ M
        grad_W = (G - H @ B64.t()).to(W.dtype) if ctx.needs_input_grad[0] else None
        grad_B = None
        if ctx.needs_input_grad[1]:
            S = C.t() @ H
            grad_B = (B64 @ (S + S.t()) - W64.t() @ H - G.t() @ C).to(B.dtype)
        return grad_W, grad_B


def project(W: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """`P(W)`: the rows of `W` without their components in the span of `B`'s columns; differentiable once, in both.

    Where `B` is zero (as LoRA starts), `P(W) = W` and the gradients are finite.

    Args:
        W: `(r, d)`, any floating dtype.
        B: `(d, r_lora)`, any floating dtype.

    Returns:
        `(r, d)`, in the dtype of `W`, at least float32.
    """
    with torch.autocast(W.device.type, enabled=False):
        return cast(torch.Tensor, _Project.apply(W, B.to(W.device)))  # type: ignore[no-untyped-call]  # torch's


@torch.no_grad()
def overlap(W: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """The largest `|W_i . B_j| / (|W_i| |B_j|)` over the rows of `W` and the columns of `B`, a scalar."""
    W, B = _accurate(W), _accurate(B).to(W.device)
    return torch.nan_to_num((W @ B).abs() / (W.norm(dim=1)[:, None] * B.norm(dim=0))).amax()


@torch.no_grad()
def projected(W: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """`P(W)` in the dtype of `W`; `W` itself, bit for bit, if it satisfies the constraint or nearly as well.

    Rounding to half precision spoils the constraint (overlap near 1e-4 in bfloat16). What rounding adds is projected
    out again, in the entries of least magnitude, which are rounded finest: below 1e-6 again from a width of 500 or so.
    """
    new = project(W, B)
    rounded = new.to(W.dtype)
    if W.dtype not in (torch.float32, torch.float64):
        order = new.abs().argsort(dim=1).argsort(dim=1)
        d, needed = B.shape
        count = d // 2
        while count >= 2 * needed:
            rounded = _absorb(rounded, _accurate(B).to(W.device), order < count)
            count //= 2
    before = overlap(W, B)
    return torch.where((before < _SATISFIED) | (before <= 2 * overlap(rounded, B)), W, rounded)


def _absorb(W: torch.Tensor, B: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
    """`W` with its overlap with `B` removed by changing the entries `free` (a mask of its shape) alone."""
    unit = B / B.norm(dim=0).clamp_min(torch.finfo(B.dtype).tiny)
    masked = free[..., None] * unit  # (r, d, r_lora)
    gram = masked.transpose(1, 2) @ masked
    gram = gram + 1e-9 * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    error = (W.to(unit.dtype) @ unit)[..., None]
    change = masked @ torch.linalg.solve(gram, error)
    return torch.where(free, (W.to(unit.dtype) - change[..., 0]).to(W.dtype), W)


class JointLowRank(LowRank, SteppedEdit):
    """A [`LowRank`] edit whose `W_down` is kept orthogonal to a `lora_B`.

    Args:
        lora (`LoraLayer`): the adapted linear layer that ends the block's MLP.
        adapter_name (`str`): the name of the adapter, in `lora` too.
        orthogonal (`str`): `"always"`, `"periodic"` or `"none"`, see [`JointSteerLoraConfig`].
        interval (`int`): with `"periodic"`, the number of optimizer steps from one projection to the next.
        kwargs: those of [`LowRank`].
    """

    steps: torch.Tensor  # a buffer, with "periodic"

    def __init__(
        self,
        *args: Any,
        lora: LoraLayer,
        adapter_name: str,
        orthogonal: str,
        interval: int = 1,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.orthogonal, self.interval = orthogonal, interval
        self._lora = (lora, adapter_name)  # in a tuple: not a submodule of this one
        if orthogonal == "periodic":
            # Part of the adapter's state: projections keep their rhythm when training is resumed.
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=self.W_down.device))

    @property
    def acts(self) -> bool:
        """Whether there is a constraint, and the LoRA that it refers to."""
        lora, adapter_name = self._lora
        return self.orthogonal != "none" and adapter_name in lora.lora_B

    @property
    def writer(self) -> LoraLayer:
        """The `LoraLayer` that ends the block's MLP."""
        return self._lora[0]

    @property
    def B(self) -> torch.Tensor:
        """`lora_B` of the linear layer that ends the block's MLP, `(d, r_lora)`."""
        lora, adapter_name = self._lora
        return _stored(lora.lora_B[adapter_name], "weight")

    @property
    def W_read(self) -> torch.Tensor:
        if self.orthogonal == "always":
            return project(self.W_down, self.B)
        if self.orthogonal != "periodic" or not self.acts:
            return self.W_down
        if self.training:
            _refuse_flat_parameter(self.W_down)
            return self.W_down
        if torch.is_grad_enabled():  # what is evaluated is what would be saved
            return project(self.W_down, self.B)
        return projected(self.W_down, self.B)

    def factors(self, dtype: torch.dtype) -> Factors:
        W = self.W_read
        if W is not self.W_down:
            W = W.to(dtype)  # it is kept for backward: not in float32 beside a model in half precision
        return W, self.W_up, None, self.b

    def sources(self) -> list[torch.Tensor]:
        return [*super().sources(), self.B] if self.acts else super().sources()

    def overlap(self) -> float:
        """Overlap of what is read with `lora_B`. Collective where the parameters are distributed."""
        W, B = whole(_stored(self, "W_down")), whole(self.B)
        return overlap(project(W, B) if self.orthogonal == "always" else W, B).item()

    @torch.no_grad()
    def project_(self) -> None:
        """Project `W_down` in place. Collective where the parameters are distributed."""
        W = self.W_down
        _refuse_flat_parameter(W)
        if W.is_meta:
            raise RuntimeError("`W_down` is offloaded and cannot be projected in place: project before offloading.")
        new = projected(whole(W), whole(self.B))
        if isinstance(W, DTensor):  # every rank has computed the same
            new = distribute_tensor(new, W.device_mesh, W.placements, src_data_rank=None)
        W.copy_(new)

    def updated_with(self) -> list[nn.Parameter]:
        return [self.W_down, cast(nn.Parameter, self.B)] if self.acts else []

    @staticmethod
    def after_step(edits: list[SteppedEdit], update: Update) -> None:
        for edit in edits:
            if not isinstance(edit, JointLowRank):
                raise TypeError(f"{type(edit).__name__} is in the group of a joint adapter.")
            if edit.orthogonal == "periodic":
                edit.steps += 1
                if edit.steps.item() % edit.interval:
                    continue
            edit.project_()


def _stored(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter; its data too if accelerate has offloaded it, between calls of its module."""
    p: torch.Tensor = getattr(module, name)
    if not p.is_meta:
        return p
    if "_hf_hook" not in vars(module):
        raise RuntimeError(
            f"`{name}` of {type(module).__name__} is on the meta device, without data: PEFT's LoRA cannot be put into "
            "a model that is offloaded already. Adapt the model first, then offload it."
        )
    return cast(torch.Tensor, vars(module)["_hf_hook"].weights_map[name])


def _refuse_flat_parameter(W: torch.Tensor) -> None:
    refuse_flat("W_down", W, ", or `orthogonal='always'` (DeepSpeed) or `orthogonal='none'`")
