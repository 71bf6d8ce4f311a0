"""Adapters of any PEFT type on one base: their strength, and how they are taken off again."""

import math
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from peft_steer import JointSteerLoraModel, SteerModel
from peft_steer.utils.errors import UsageError


def check(peft: Any, scale: Any) -> None:
    """Raises `UsageError` unless `peft` can name an adapter or none, and `scale` is its strength or None."""
    if peft is not None and not isinstance(peft, str):
        raise UsageError(
            f"`peft={peft!r}` must be the path of one adapter. For several on one base use `peft-steer lm-eval`, or "
            "`load_adapter`."
        )
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise UsageError(f"`scale={scale!r}` must be a finite number.")
    if not peft:
        raise UsageError(f"`scale={scale!r}` is the strength of an adapter, and there is none: set `peft`.")


def set_strength(model: PeftModel, scale: float) -> None:
    """Makes the active adapter act with `scale` times the strength that it was trained with.

    Raises:
        UsageError: If it is neither a steering adapter nor a LoRA, nor both.
    """
    tuner = model.base_model
    if isinstance(tuner, (SteerModel, JointSteerLoraModel)):
        tuner.set_scale(model.active_adapter, scale)
    elif isinstance(tuner, LoraModel):
        for layer in tuner.modules():
            if isinstance(layer, LoraLayer):
                layer.scale_layer(scale)
    else:
        kind = model.active_peft_config.peft_type.value
        raise UsageError(
            f"`scale={scale!r}`: only steering, joint and LoRA adapters have a strength, {kind} has none."
        )


def take_off(model: PreTrainedModel | PeftModel, expected: dict[str, int] | None) -> PreTrainedModel:
    """The base, without the adapter that `model` may have.

    Args:
        model: A model, with an adapter or without.
        expected: The [`fingerprint`] of the base without it, or None if it is unknown.

    Raises:
        UsageError: If the adapter cannot be taken off, or has changed the base's own weights.
    """
    if not isinstance(model, PeftModel):
        return model
    kind = model.active_peft_config.peft_type.value
    base: Any
    if model.active_peft_config.is_prompt_learning:
        base = model.get_base_model()
    elif isinstance(model.base_model, BaseTuner):
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.set_adapter([])  # or PEFT 0.21 leaves the trained copy in the base
        base = model.unload()
    else:
        raise UsageError(f"An adapter of type {kind} cannot be taken off its base: evaluate it by itself.")
    if expected is not None and fingerprint(base) != expected:
        raise UsageError(
            f"The adapter of type {kind} has changed the base's own weights (as LoRA's `bias` and some values of its "
            "`init_lora_weights` do), which are lost: evaluate it by itself."
        )
    return base


def fingerprint(model: nn.Module) -> dict[str, int]:
    """The sum of the bytes of every parameter and buffer, by name; those that are elsewhere (offloaded, or in a tensor
    type of a quantization library) have none."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        name: int(x.detach().flatten().view(torch.uint8).sum(dtype=torch.int64))
        for name, x in tensors
        if not x.is_meta and not is_traceable_wrapper_subclass(x)
    }
