"""Adapters that are given to an analysis: recognised and checked from their files, before a model is loaded."""

import logging
import warnings
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import peft_steer  # noqa: F401  (registers the tuner types)
from peft_steer.utils.errors import UsageError

from .error_context import error_context


logger = logging.getLogger(__name__)


def check_adapter(base: str, base_name: str, adapter: str, flag: str) -> None:
    """Checks that an adapter fits a model: its tensors are put into the model's modules on the meta device, without
    memory.

    Args:
        base: The model's directory or hub id.
        base_name: What the user calls it.
        adapter: The adapter's directory or hub id.
        flag: The flag that the adapter was given with.

    Raises:
        UsageError: If it does not fit, cannot be read, or adds tokens to the sequence.
    """
    config = read_adapter_config(adapter, flag)
    if config.is_prompt_learning:
        raise UsageError(
            f"{flag}: {adapter!r} is a {PeftType(config.peft_type).value} adapter, which adds tokens of its own: its "
            "hidden states are not those of the base's tokens. Choose another kind of adapter."
        )
    recorded = config.base_model_name_or_path
    if recorded and recorded not in (base, base_name):
        logger.warning("%s: %s was trained on %s and is put on %s.", flag, adapter, recorded, base_name)
    with error_context(flag, adapter, "has no adapter weights that can be read", SafetensorError, RuntimeError):
        saved = set(load_peft_weights(adapter, device="cpu"))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns for every tensor that copying to the meta device does nothing
        model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        with error_context(flag, adapter, f"does not belong to the base {base!r}", RuntimeError):
            model = PeftModel.from_pretrained(model, adapter, torch_device="cpu")
    places = set(get_peft_model_state_dict(model))
    extra, lacking = saved - places, {name for name in places - saved if model.base_model.prefix in name}
    if extra:
        raise UsageError(
            f"{flag}: {adapter!r} does not belong to the base {base!r}, which has no place for {len(extra)} of its "
            f"{len(saved)} tensors, such as {min(extra)!r}"
        )
    if lacking:
        raise UsageError(
            f"{flag}: {adapter!r} does not belong to the base {base!r} or is damaged: it lacks "
            f"{len(lacking)} of {len(places)} tensors, such as {min(lacking)!r}"
        )


def read_adapter_config(adapter: str, flag: str) -> PeftConfig:
    """The configuration of an adapter; `UsageError`, naming `flag`, if it cannot be read."""
    with error_context(flag, adapter, "has no adapter_config.json that PEFT can read", TypeError, KeyError):
        return PeftConfig.from_pretrained(adapter)


def is_adapter(path: str) -> bool:
    """Whether a directory or hub id holds an adapter."""
    if Path(path).is_dir():
        return (Path(path) / "adapter_config.json").is_file()
    try:
        PeftConfig.from_pretrained(path)
    except ValueError:  # "Can't find 'adapter_config.json'"
        return False
    return True
