"""Steering layers stay at the place that they steer when another tuner wraps the module there, or unwraps it.

LoRA, `modules_to_save` and others put a module of their own where the steered one was. The edit would then be of what
is inside, and its name would depend on who came first: `o_proj.base_layer.input_steering`. So whenever PEFT, or a
quantizer, puts another module in the place of one that carries steering layers, they move to it. What wraps a module
without a meaning of its own (FSDP, gradient checkpointing, `torch.compile`) leaves them where they are.
"""

import re

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .layer import CHILD, INPUT_CHILD, SteerLayer


_WRAPPED = re.compile(rf"(\.(base_layer|original_module|modules_to_save\.[^.]+))+(?=\.({INPUT_CHILD}|{CHILD})\.)")


def unwrapped_key(key: str) -> str:
    """The key of a steering layer's tensor as it is if nothing wraps the steered module."""
    return _WRAPPED.sub("", key)


def _follow(parent: nn.Module, name: str, new: nn.Module | None) -> None:
    """Hook on the registration of any submodule: `new` is about to be `parent.name`."""
    old = parent._modules.get(name)
    if old is None or new is None or new is old:
        return
    layers = [child for child in map(old._modules.get, (CHILD, INPUT_CHILD)) if isinstance(child, SteerLayer)]
    inside = list(new.modules())
    if isinstance(new, AuxiliaryTrainingWrapper):
        _refuse_deeper(parent, name, old, layers)
    if not layers or (any(m is old for m in inside) and not _is_of_peft(new)):
        return
    for layer in layers:
        layer.detach()
        for module in inside:  # a wrapper may hold copies of what it wraps
            copied = module._modules.get(layer.child)
            if isinstance(copied, SteerLayer):
                copied.detach()
        layer.attach(new)


def _is_of_peft(module: nn.Module) -> bool:
    own = isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    return own or type(module).__module__.partition(".")[0] == "peft"


def _refuse_deeper(parent: nn.Module, name: str, old: nn.Module, layers: list[SteerLayer]) -> None:
    deeper = [m for m in old.modules() if isinstance(m, SteerLayer) and not any(m is layer for layer in layers)]
    if deeper:
        raise ValueError(
            f"`modules_to_save` would copy {name!r} ({type(old).__name__}) with the steered modules inside it, and "
            "train the copy. Name modules without steered parts, or steer them from outside (`site='block'`)."
        )


register_module_module_registration_hook(_follow)
