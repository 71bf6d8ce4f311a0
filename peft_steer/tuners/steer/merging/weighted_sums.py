"""Adapters that are weighted sums of others, where one adapter equals the sum: fixed vectors, and low-rank edits with
one activation, side by side."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from peft_steer.interventions import FixedVector, LowRank
from peft_steer.interventions.low_rank_form import LowRankForm

from ..config import SteerConfig
from ..layer import SteerLayer


def config_of_sum(
    layers: Mapping[str, SteerLayer],
    known: Mapping[str, SteerConfig],
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    options: dict[str, Any],
) -> SteerConfig:
    """The configuration of the sum of these adapters.

    Args:
        layers: of the model, by the name of the module that they steer.
        known: the configurations of all adapters.
        adapters, weights, adapter_name, options: as `SteerModel.add_weighted_adapter` has them.

    Raises:
        ValueError: if an argument is wrong, or the sum is not an adapter of their kind.
    """
    _check_arguments(known, adapters, weights, adapter_name, options)
    configs = [known[name] for name in adapters]
    same_sites = all(len({name in layer.steer_edit for name in adapters}) == 1 for layer in layers.values())
    same_tokens = len({c.positions for c in configs}) == 1 and all(c.share_weights for c in configs)
    if not (same_tokens and same_sites):
        raise _no_sum("they must be at the same sites and positions, with one edit for them")
    terms = {
        name: _terms(layer, adapters, weights) for name, layer in layers.items() if adapters[0] in layer.steer_edit
    }
    ranks = {name: sum(len(form.A) for form in forms) for name, forms in terms.items()}
    for name, rank in ranks.items():
        if rank > layers[name].in_features:
            raise _no_sum(f"the sum at {name!r} has rank {rank}, more than the width {layers[name].in_features}")
    return _side_by_side(configs[0], [form for forms in terms.values() for form in forms], ranks)


def _check_arguments(
    known: Mapping[str, SteerConfig],
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    options: dict[str, Any],
) -> None:
    if options:
        raise ValueError(f"`{next(iter(options))}` chooses how LoRA's weights are combined; leave it out.")
    if adapter_name in known:
        raise ValueError(f"`adapter_name={adapter_name!r}` exists already. Choose another name.")
    unknown = [name for name in adapters if name not in known]
    if unknown or not adapters or len(adapters) != len(weights):
        raise ValueError(f"`adapters={adapters!r}` with `weights={weights!r}`: one weight for each, of {list(known)}.")


def _side_by_side(config: SteerConfig, forms: list[LowRankForm], ranks: dict[str, int]) -> SteerConfig:
    """`config` with the kind that has all these forms, and the ranks of their sums by the name of the module."""
    activations = {activation for form in forms for activation in form.activations}
    constants = [form for form in forms if form.v is not None or form.c is not None]
    if len(activations) > 1 or (activations - {None} and constants):
        raise _no_sum("edits with different activations, or with one and a bias, do not fit into one of their kinds")
    if not activations:
        return replace(config, kind="vector", activation=None, use_bias=False, rank_pattern={}, scale=1.0)
    (activation,) = activations
    r = Counter(ranks.values()).most_common(1)[0][0]
    return replace(
        config,
        kind="nonlinear" if activation else "linear",
        r=r,
        activation=activation,
        use_bias=bool(constants),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != r},
        scale=1.0,
    )


def _no_sum(reason: str) -> ValueError:
    return ValueError(
        f"No adapter equals the weighted sum of these: {reason}. Activate the adapters together instead, "
        "`model.base_model.set_adapter([...])`, each with its `model.set_scale(name, x)`."
    )


def _terms(layer: SteerLayer, adapters: list[str], weights: list[float]) -> list[LowRankForm]:
    """The edits of the adapters, at their present strength times their weight."""
    forms = []
    for name, weight in zip(adapters, weights, strict=True):
        form = layer.shared_edit(name).low_rank(weight * layer.strength(name))
        if form is None:
            raise _no_sum("LoFiT's and JoLA's edits are of no low rank")
        forms.append(form)
    return forms


@torch.no_grad()
def add_up(layers: Iterable[SteerLayer], adapters: list[str], weights: list[float], adapter_name: str) -> None:
    """Write the weighted sum of the adapters, at their present strength, into `adapter_name`."""
    for layer in layers:
        if adapter_name not in layer.steer_edit:
            continue
        edit, forms = layer.shared_edit(adapter_name), _terms(layer, adapters, weights)
        constant = edit.v if isinstance(edit, FixedVector) else None
        if isinstance(edit, LowRank):
            constant = edit.b
            edit.W_down.copy_(torch.cat([form.A for form in forms]))
            edit.W_up.copy_(torch.cat([form.B for form in forms], dim=1))
        if constant is not None:
            constant.copy_(torch.stack([form.v for form in forms if form.v is not None]).sum(0))
