"""The modules that a configuration asks for, and where they are put."""

import torch
from torch import nn

from peft_steer.interventions.base import Intervention
from peft_steer.interventions.jola import Jola
from peft_steer.interventions.lofit import Lofit
from peft_steer.interventions.low_rank import FixedVector, LowRank
from peft_steer.interventions.optimizer_hooks import Group
from peft_steer.interventions.reft import Direft, Loreft, Nodireft, Noreft

from .config import SteerConfig


def build_intervention(
    config: SteerConfig,
    d: int,
    r: int,
    device=None,
    dtype=None,
    head_dim: int | None = None,
    group: Group | None = None,
) -> Intervention:
    """The module for `config.kind`, for hidden states of width `d` and with rank `r`; for kinds that edit heads, of
    width `head_dim`, with the group of the adapter's edits."""
    common = {"init_weights": config.init_weights, "device": device, "dtype": dtype}
    if config.kind == "vector":
        return FixedVector(d, **common)
    if config.kind == "loreft":
        return Loreft(d, r, **common)
    if config.kind == "jola":
        return Jola(d // head_dim, head_dim, group, **common)
    if config.kind == "lofit":
        stages = {"chosen": config.num_heads, "selection_step": config.selection_step, "l1_lambda": config.l1_lambda}
        return Lofit(d // head_dim, head_dim, group, **stages, **common)
    reft = {"noreft": Noreft, "direft": Direft, "nodireft": Nodireft}
    if config.kind in reft:
        return reft[config.kind](d, r, activation=config.activation, **common)
    return LowRank(d, r, activation=config.activation, use_bias=config.use_bias, **common)


def device_and_dtype(target: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device on which the steered module runs and the dtype in which it computes."""
    parameters = [p for module in (target, model) for p in module.parameters()]
    dtype = next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)
    if not parameters:
        return torch.device("cpu"), dtype
    device = parameters[0].device
    if device.type == "meta":  # offloaded by accelerate, which knows where it runs
        hooks = (m._hf_hook for m in target.modules() if hasattr(m, "_hf_hook"))
        device = torch.device(
            next((hook.execution_device for hook in hooks if hook.execution_device is not None), "cpu")
        )
    return device, dtype
