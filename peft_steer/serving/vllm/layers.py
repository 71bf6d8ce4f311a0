"""What acts at a place: one edit for all tokens, or one for each slot of vLLM's LoRA manager."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from peft_steer.interventions.low_rank import ACTIVATIONS
from peft_steer.interventions.low_rank_form import LowRankForm

from .private import token_slots


FUNCTIONS = [None, *ACTIVATIONS.values()]
CODES = {name: code for code, name in enumerate([None, *ACTIVATIONS])}


class Edit(nn.Module):
    """`dh = B f(A h + c) + v` for every token; zero until its tensors are written.

    They are buffers that are not saved, so that a checkpoint's weights are complete without them.
    """

    A: torch.Tensor | None
    B: torch.Tensor
    c: torch.Tensor | None
    v: torch.Tensor | None

    def __init__(self, d: int, like: LowRankForm):
        super().__init__()
        self.runs = [(CODES[name], len(list(units))) for name, units in itertools.groupby(like.activations)]
        for name in ("A", "B", "c", "v"):
            self.register_buffer(name, None, persistent=False)
        for name, x in like.tensors().items():
            self.register_buffer(name, torch.zeros(x.shape), persistent=False)

    @torch.no_grad()
    def write(self, name: str, x: torch.Tensor) -> None:
        """Write the tensor `name`, one of the form's."""
        buffer = getattr(self, name, None)
        if buffer is None or buffer.shape != x.shape:
            shape = None if buffer is None else tuple(buffer.shape)
            raise ValueError(f"The edit has {name} of shape {shape}, and was given {tuple(x.shape)}.")
        # During a reload vLLM puts a loader of its own on the buffer.
        getattr(buffer, "weight_loader", default_weight_loader)(buffer, x)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        if self.A is None:
            assert self.v is not None  # rank 0 is a fixed vector
            return self.v.expand_as(h)
        z = F.linear(h, self.A, self.c)
        if any(code for code, _ in self.runs):
            parts = z.split([length for _, length in self.runs], -1)
            parts = [FUNCTIONS[code](x) if code else x for (code, _), x in zip(self.runs, parts, strict=True)]
            z = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return F.linear(z, self.B, self.v)


class RequestEdit(LinearBase):
    """The place of an edit per request, where vLLM's LoRA manager puts `SlottedEdit`.

    A linear layer, though it has no weight: those are what the manager looks for.
    """

    def __init__(self, d: int, prefix: str):
        super().__init__(d, d, bias=False, prefix=prefix, return_bias=False, disable_tp=True)
        self.quant_method = None  # nothing to quantize

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(f"vLLM's LoRA manager did not take {self.prefix!r} in: its edits would be lost.")


class SlottedEdit(BaseLinearLayerWithLoRA):
    """`dh` of the slot that each token has: all slots in one product, zero where a token's slot is another.

    It takes no kernel of any platform, is exactly zero for tokens without an adapter, and its shapes do not depend on
    which adapters are in the batch, which CUDA graphs need. `A`, of `slots x (max_lora_rank + 1)` units, has in each
    slot's last unit the constant 1, whose column of `B` is `v`. The activation of a unit is a code.
    """

    def __init__(self, base_layer: RequestEdit):
        nn.Module.__init__(self)  # not the superclass's, which asks the base layer for its weight
        self._enable_aux_cuda_stream = False
        self.base_layer = base_layer
        self.input_size = self.output_size = base_layer.input_size
        self.tp_size, self.tp_rank, self.n_slices = 1, 0, 1

    @classmethod
    def can_replace_layer(cls, source_layer: nn.Module, *args: Any, **kwargs: Any) -> bool:
        return isinstance(source_layer, RequestEdit)

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        self.lora_config = lora_config
        units, d, dtype = lora_config.max_lora_rank + 1, self.input_size, lora_config.lora_dtype
        device = self.base_layer.device
        self.A, self.B = (torch.zeros(max_loras, units, d, dtype=dtype, device=device) for _ in range(2))
        self.c = torch.zeros(max_loras, units, dtype=dtype, device=device)
        self.c[:, -1] = 1
        self.code = torch.zeros(max_loras, units, dtype=torch.int8, device=device)
        self.slots = torch.arange(max_loras, device=device)
        self.lora_a_stacked, self.lora_b_stacked = (self.A,), (self.B,)  # the shapes of vLLM's warm-up adapters

    def reset_lora(self, index: int) -> None:
        self.A[index], self.B[index], self.code[index] = 0, 0, 0
        self.c[index, :-1] = 0

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Fill a slot from a pair that `pack` made."""
        self.reset_lora(index)
        d, r = self.input_size, lora_a.shape[0]
        if lora_a.shape[1] == d:  # vLLM's warm-up adapter
            return
        self.A[index, :r].copy_(lora_a[:, :d])
        self.c[index, :r].copy_(lora_a[:, d])
        self.code[index, :r].copy_(lora_a[:, d + 1].round())
        self.B[index, :r].copy_(lora_b[:, :r].t())
        self.B[index, -1].copy_(lora_b[:, r])

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        slots, units, d = self.A.shape
        z = F.linear(h, self.A.view(slots * units, d), self.c.view(-1))
        code = self.code.view(-1)
        activated = z
        for i, function in enumerate(FUNCTIONS):
            if function is not None:
                activated = torch.where(code == i, function(z), activated)
        here = token_slots(self, h.shape[0])[:, None] == self.slots
        z = torch.where(here[:, :, None], activated.view(-1, slots, units), 0)
        return z.view(-1, slots * units) @ self.B.view(slots * units, d)


def pack(form: LowRankForm) -> tuple[torch.Tensor, torch.Tensor]:
    """The form as a LoRA pair, which vLLM carries: `A | c | codes`, `(r, d + 2)`, and `B | v`, `(d, r + 1)`."""
    A, B, d = form.A, form.B, form.A.shape[1]
    codes = A.new_tensor([CODES[name] for name in form.activations])
    c = A.new_zeros(len(A)) if form.c is None else form.c
    v = A.new_zeros(d) if form.v is None else form.v
    if not len(A):  # vLLM has no rank 0
        A, B, c, codes = A.new_zeros(1, d), B.new_zeros(d, 1), c.new_zeros(1), codes.new_zeros(1)
    return torch.cat([A, c[:, None], codes[:, None]], 1).contiguous(), torch.cat([B, v[:, None]], 1).contiguous()
