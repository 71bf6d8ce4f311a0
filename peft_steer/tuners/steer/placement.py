"""On which device and in which dtype a new edit is made."""

import torch
from torch import nn


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
