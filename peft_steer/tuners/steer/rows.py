"""Rows of one batch with different adapters: `model(..., adapter_names=[...])`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .layer import SteerLayer


def check_rows(
    layers: Sequence[SteerLayer], adapter_names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raise `ValueError` unless the model, called with these arguments, can give each row the adapter named for it."""
    if any(layer.merged for layer in layers):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    unknown = set(adapter_names) - {"__base__"} - {name for layer in layers for name in layer.steer_edit}
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
    named = (kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds", "input_features"))
    inputs = next((x for x in (*args[:1], *named, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
    if inputs is not None and len(inputs) != len(adapter_names):
        raise ValueError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {len(adapter_names)} "
            f"and {len(inputs)} respectively."
        )


@contextmanager
def with_rows(layers: Sequence[SteerLayer], adapter_names: Sequence[str]) -> Iterator[None]:
    """Meanwhile `layers` steer each row by the adapter named for it."""
    for layer in layers:
        layer.row_adapters = list(adapter_names)
    try:
        yield
    finally:
        for layer in layers:
            layer.row_adapters = None


@contextmanager
def with_modules_of_rows(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Meanwhile each row goes through the trained module (`modules_to_save`) of the adapter named for it."""
    handles = [
        module.register_forward_pre_hook(partial(_pass_adapter_names, adapter_names=adapter_names), with_kwargs=True)
        for module in model.modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pass_adapter_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: Sequence[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    repeats = len(args[0]) // len(adapter_names)  # beams, returned sequences
    return args, {**kwargs, "adapter_names": [name for name in adapter_names for _ in range(repeats)]}
