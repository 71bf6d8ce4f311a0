"""A whole model with the edits in its weights, for whatever loads a model folder (llama.cpp's converter, too)."""

import copy
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn

from .edits import steer_config, who_runs_it


# Flags of transformers' configurations that give linear layers a bias.
FLAGS = ("mlp_bias", "attention_bias")


def export_merged(model: PeftModel, folder: str | Path, adapter_name: str = "default") -> None:
    """Merges an adapter where that is exact and saves the model. `model` is used up.

    Merging may give a bias to linear layers that have none. Where the architecture's configuration has a flag for them
    (Llama: `mlp_bias`, `attention_bias`), it is set, and the biases that come with it are zero.

    Raises:
        ValueError: If merging is not exact, or the architecture has no place for the biases.
    """
    config = steer_config(model, adapter_name)
    try:
        merged: Any = cast(Any, model).merge_and_unload(adapter_names=[adapter_name])
    except ValueError as error:
        raise ValueError(f"{error} {who_runs_it(config)}") from error
    make_room_for_biases(merged)
    vars(merged).pop("save_pretrained", None)  # (refused while a bias had no place)
    merged.save_pretrained(folder)


def make_room_for_biases(model: nn.Module) -> None:
    """Sets the flags of `model.config` that its biases need, and adds the zero biases that these flags imply.

    Raises:
        ValueError: If the architecture has no place for a bias.
    """
    names = set(model.state_dict())
    flags = [flag for flag in FLAGS if getattr(model.config, flag, None) is False]
    for number in range(len(flags) + 1):
        for chosen in combinations(flags, number):
            config = copy.deepcopy(model.config)
            for flag in chosen:
                setattr(config, flag, True)
            expected = _names(model, config)
            missing = expected - names
            if names <= expected and all(name.endswith(".bias") for name in missing):
                for name in missing:
                    linear = cast(nn.Linear, model.get_submodule(name.removesuffix(".bias")))
                    linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features), requires_grad=False)
                for flag in chosen:
                    setattr(model.config, flag, True)
                return
    extra = sorted(names - _names(model, model.config))
    raise ValueError(
        f"merging adds {extra[0]!r}, and {type(model).__name__} has no place for it: whatever loads the folder would "
        "drop it. Use --format lora --constants bias, or an edit without a constant (kind='linear', use_bias=False)."
    )


def _names(model: nn.Module, config) -> set[str]:
    with torch.device("meta"):
        return set(type(model)(config).state_dict())
