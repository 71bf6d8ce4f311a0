"""Adapters that are weighted sums of others, where one of the same kind equals the sum: fixed vectors."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner

from peft_steer.interventions import FixedVector

from ..config import SteerConfig
from ..layer import SteerLayer


def config_of_sum(
    tuner: BaseTuner, adapters: list[str], weights: list[float], adapter_name: str, options: dict[str, Any]
) -> SteerConfig:
    """The configuration of the sum of these adapters.

    Raises:
        ValueError: if an argument is wrong, or the sum is not an adapter of their kind.
    """
    if options:
        raise ValueError(f"`{next(iter(options))}` chooses how LoRA's weights are combined; leave it out.")
    if adapter_name in tuner.peft_config:
        raise ValueError(f"`adapter_name={adapter_name!r}` exists already. Choose another name.")
    unknown = [name for name in adapters if name not in tuner.peft_config]
    if unknown or not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"`adapters={adapters!r}` with `weights={weights!r}`: one weight for each, of {list(tuner.peft_config)}."
        )
    configs = [tuner.peft_config[name] for name in adapters]
    layers = [m for m in tuner.model.modules() if isinstance(m, SteerLayer)]
    vectors = all(issubclass(c.intervention, FixedVector) and c.share_weights for c in configs)
    same_tokens = len({c.positions for c in configs}) == 1
    same_sites = all(len({name in layer.steer_edit for name in adapters}) == 1 for layer in layers)
    if not (vectors and same_tokens and same_sites):
        raise ValueError(
            "Only fixed vectors, at the same sites and positions, have a weighted sum that is an adapter of their "
            "kind. Activate the adapters together instead, `model.base_model.set_adapter([...])`, each with its "
            "`model.set_scale(name, x)`."
        )
    return replace(configs[0], scale=1.0)


@torch.no_grad()
def add_up(layers: Iterable[SteerLayer], adapters: list[str], weights: list[float], adapter_name: str) -> None:
    """Write the weighted sum of the adapters' vectors, at their present strength, into those of `adapter_name`."""
    for layer in layers:
        if adapter_name in layer.steer_edit:
            parts = [w * layer.scaling[n] * layer.steer_edit[n].v for n, w in zip(adapters, weights, strict=True)]
            layer.steer_edit[adapter_name].v.copy_(torch.stack(parts).sum(0))
