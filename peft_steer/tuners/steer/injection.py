"""Where a configuration puts its layers in a given model, and what is checked before they are put there."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import get_pattern_key
from torch import nn

from peft_steer.interventions.optimizer_hooks import Group
from peft_steer.sites import Site, find_sites, hidden_size, select_blocks

from . import following
from .config import SteerConfig
from .layer import CHILD, INPUT_CHILD
from .position_hooks import track


@dataclass(frozen=True)
class Plan:
    """Where one adapter is put.

    Attributes:
        sites: By the name of the edited module.
        excluded: The names of those that `exclude_modules` leaves out.
        group: Stands for the adapter, to the edits that are trained together.
    """

    sites: Mapping[str, Site]
    excluded: frozenset[str] = frozenset()
    group: Group = field(default_factory=Group)


@contextmanager
def injecting(tuner: BaseTuner, model: nn.Module, adapter_name: str, positions: str) -> Iterator[None]:
    """What comes before and after an adapter's layers are put into `model`.

    Raises:
        ValueError: if the adapter cannot have that name.
    """
    check_adapter_name(model, adapter_name)
    yield
    track(model, positions)
    following.TUNERS.add(tuner)


def resolve_sites(model: nn.Module, config: SteerConfig) -> dict[str, Site]:
    """The sites that a configuration asks for, by the name of the edited module.

    Raises:
        ValueError: if a block or a site that it names cannot be found.
    """
    return _sites(model, config, config.exclude_modules)


def plan_injection(model: nn.Module, config: SteerConfig) -> Plan:
    """Where the adapter goes; writes the model's width and depth into `config`.

    Raises:
        ValueError: if the configuration does not fit the model.
    """
    sites = resolve_sites(model, config)
    record_shape(model, config, next(iter(sites.values())))
    check_shapes(config, sites)
    excluded = _sites(model, config, None).keys() - sites.keys() if config.exclude_modules else ()
    return Plan(sites, frozenset(excluded))


def _sites(model: nn.Module, config: SteerConfig, exclude_modules: list[str] | str | None) -> dict[str, Site]:
    blocks = select_blocks(
        model, config.target_modules, exclude_modules, config.layers_to_transform, config.layers_pattern
    )
    pattern = config.rank_pattern
    return {
        name: replace(site, rank=pattern.get(get_pattern_key(list(pattern), name), config.r))
        for name, site in find_sites(model, blocks, config.sites, config.hidden_size).items()
    }


def check_shapes(config: SteerConfig, sites: Mapping[str, Site]) -> None:
    """Raise `ValueError` if an edit's rank exceeds the width of what it edits, or there are too few heads."""
    for name, site in sites.items():
        if config.intervention.has_rank and site.rank > site.width:
            what = "hidden size" if site.head_dim is None else "heads' joint width"
            raise ValueError(
                f"`r={site.rank}` at {name!r} is larger than the {what} {site.width}; choose a smaller rank."
            )
    config.intervention.check_heads(config, sum(site.num_heads for site in sites.values()))


def record_shape(model: nn.Module, config: SteerConfig, site: Site) -> None:
    """Write the model's width and depth into `config`, or raise `ValueError` if `config` comes with an adapter for
    others."""
    width = hidden_size(model, site.block.name, config.hidden_size)
    shape = (width, len(model.get_submodule(site.block.stack)._modules))
    if any(said not in (None, found) for said, found in zip(config._made_for, shape, strict=True)):
        raise ValueError(
            "The adapter was made for a model with hidden_size={} and num_blocks={}; ".format(*config._made_for)
            + f"{type(model).__name__} has {shape[0]} and {shape[1]}. Load it onto its base model"
            + (f" ({config.base_model_name_or_path})." if config.base_model_name_or_path else ".")
        )
    config.hidden_size, config.num_blocks = shape


def check_adapter_name(model: nn.Module, adapter_name: str) -> None:
    """Raise `ValueError` if the name is a part of a module's path: PEFT tells adapters apart by `.name.` in the
    key."""
    parts = {CHILD, INPUT_CHILD, "steer_edit", "lora_steer_edit", "prefix", "suffix"}
    for name, _ in model.named_modules():
        if f"{CHILD}." not in name:
            parts.update(name.split("."))
    if "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(f"`adapter_name={adapter_name!r}` cannot be the name of a module. Choose another name.")
    if adapter_name in parts:
        raise ValueError(
            f"`adapter_name={adapter_name!r}` is also the name of a module in {type(model).__name__}; PEFT could not "
            "save the adapter. Choose another name."
        )


def check_state_dict(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor], marker: str) -> None:
    """Raise `ValueError` unless `state_dict` has exactly the tensors that the adapter has in `model`, of its shapes
    and without NaN."""

    def bare(name: str) -> str:
        return name.removeprefix("base_model.model.")

    expected = {bare(k): p for k, p in model.state_dict().items() if f"{marker}.{adapter_name}." in k}
    found = {bare(k): x for k, x in state_dict.items() if f"{marker}." in k}
    for what, names in (("lacks", expected.keys() - found.keys()), ("has extra", found.keys() - expected.keys())):
        if names:
            raise ValueError(
                f"The checkpoint of adapter {adapter_name!r} {what} {len(names)} tensor(s), such as {min(names)!r}: "
                "it belongs to another configuration or base model, or the file is damaged."
            )
    for name, x in found.items():
        if x.shape != expected[name].shape:
            raise ValueError(
                f"{name!r} has the shape {tuple(x.shape)} in the checkpoint of adapter {adapter_name!r} and "
                f"{tuple(expected[name].shape)} in the model: the checkpoint belongs to another rank or base model."
            )
        if not x.isfinite().all():
            raise ValueError(f"{name!r} in the checkpoint of adapter {adapter_name!r} has values that are not finite.")
