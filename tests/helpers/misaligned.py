"""Parameters that begin anywhere in memory, as `MISALIGNED=1` asks for: results of products and factorizations may
depend on it, so a test must not expect two models with equal parameters to agree to the last bit."""

import itertools

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook


_offsets = itertools.cycle(range(1, 16))


def install() -> None:
    register_module_parameter_registration_hook(_misalign)


def _misalign(module: nn.Module, name: str, p: nn.Parameter) -> None:
    x = None if p is None else p.detach()
    if (
        type(x) is not torch.Tensor
        or type(p) is not nn.Parameter
        or x.device.type != "cpu"
        or not x.is_floating_point()
    ):
        return
    if not x.is_contiguous() or x.data_ptr() % 64 or x.numel() == 0:
        return
    start = next(_offsets)
    memory = torch.empty(start + x.numel(), dtype=x.dtype, device="cpu")
    p.data = memory[start:].view(x.shape).copy_(x)
