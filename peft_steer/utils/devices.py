"""The accelerator of this machine (CUDA, ROCm, XPU, MPS or another), and where a module runs."""

import os
import platform

import torch
from torch import nn


def default_device() -> torch.device:
    """The current accelerator, or the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def has_accelerator() -> bool:
    """Whether there is one that can be used."""
    return torch.accelerator.is_available()


def counts_memory(device: torch.device) -> bool:
    """Whether torch counts what it allocates there: not on a CPU, nor on MPS, which shares the process's memory."""
    return device.type not in ("cpu", "mps")


def visible_accelerators() -> list[str]:
    """The numbers or names of the accelerators that this process may use, as `visibility_variable` takes them."""
    count = torch.accelerator.device_count() if has_accelerator() else 0
    named = [name for name in os.environ.get(visibility_variable(), "").split(",") if name]
    return (named or [str(i) for i in range(count)])[:count]


def visibility_variable() -> str:
    """The environment variable that says which accelerators a process sees. (ROCm's torch reads CUDA's, too.)"""
    return {"xpu": "ZE_AFFINITY_MASK", "npu": "ASCEND_RT_VISIBLE_DEVICES"}.get(
        default_device().type, "CUDA_VISIBLE_DEVICES"
    )


def device_name(device: torch.device) -> str:
    """For tables: the accelerator's name, or the CPU's architecture and the number of threads."""
    if device.type == "cpu":
        return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    get_name = getattr(torch.get_device_module(device), "get_device_name", None)
    return get_name(device) if get_name else device.type


def device_and_dtype(target: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device on which `target`, a module of `model`, runs, and the dtype in which it computes."""
    parameters = [p for module in (target, model) for p in module.parameters()]
    dtype = next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)
    if not parameters:
        return torch.device("cpu"), dtype
    device = parameters[0].device
    if device.type == "meta":  # offloaded by accelerate, which knows where it runs
        hooks = (vars(m)["_hf_hook"] for m in target.modules() if "_hf_hook" in vars(m))
        device = torch.device(
            next((hook.execution_device for hook in hooks if hook.execution_device is not None), "cpu")
        )
    return device, dtype
