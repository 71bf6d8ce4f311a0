"""Where a configuration puts its layers in a given model, and what is checked before they are put there."""

import torch
from peft.utils.other import get_pattern_key
from torch import nn

from peft_steer.sites import Block, head_shape, hidden_size, select_blocks, site_module

from .config import HEAD_KINDS, SteerConfig
from .layer import CHILD, INPUT_CHILD


def resolve_sites(model: nn.Module, config: SteerConfig) -> tuple[dict[str, Block], set[str]]:
    """The modules to steer, by qualified name, each with its block; and the names of those that were excluded."""

    def sites(exclude_modules):
        blocks = select_blocks(
            model, config.target_modules, exclude_modules, config.layers_to_transform, config.layers_pattern
        )
        found = {}
        for block in blocks:
            for site in config.sites:
                name = site_module(block, site)[0]
                if name in found:
                    raise ValueError(
                        f"`site={config.site!r}` names two places at the module {name!r}; use an adapter for each."
                    )
                found[name] = block
        return found

    chosen = sites(config.exclude_modules)
    excluded = set(sites(None)) - set(chosen) if config.exclude_modules else set()
    return chosen, excluded


def site_at(config: SteerConfig, name: str, block: Block) -> str:
    """Which of the configuration's sites is at the module `name` of `block`."""
    return next(site for site in config.sites if site_module(block, site)[0] == name)


def rank_of(config: SteerConfig, name: str) -> int:
    """Rank of the edit at module `name`."""
    return config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)


def place(model: nn.Module, config: SteerConfig, name: str, block: Block) -> tuple[str, int, int | None]:
    """Of the place at module `name`: the name of the child there, the width of what is edited, and at the attention's
    heads their width."""
    if site_at(config, name, block) != "heads":
        return CHILD, hidden_size(model, name), None
    number, head_dim = head_shape(block)
    return INPUT_CHILD, number * head_dim, head_dim


def check_shapes(model: nn.Module, config: SteerConfig, sites: dict[str, Block]) -> None:
    """Raise `ValueError` if an edit's rank exceeds the width of what it edits, or there are too few heads."""
    total = 0
    for name, block in sites.items():
        r, (_, width, head_dim) = rank_of(config, name), place(model, config, name, block)
        total += width // (head_dim or width)
        if config.kind not in ("vector", *HEAD_KINDS) and r > width:
            what = "hidden size" if head_dim is None else "heads' joint width"
            raise ValueError(f"`r={r}` at {name!r} is larger than the {what} {width}; choose a smaller rank.")
    if config.num_heads is not None and config.num_heads > total:
        raise ValueError(f"`num_heads={config.num_heads}` cannot be chosen: the targeted blocks have {total} heads.")


def record_shape(model: nn.Module, config: SteerConfig, block: Block) -> None:
    """Write the model's width and depth into `config`, or raise `ValueError` if `config` comes with an adapter for
    others."""
    found = (hidden_size(model, block.name), len(model.get_submodule(block.stack)))
    if config._made_for not in ((None, None), found):
        raise ValueError(
            "The adapter was made for a model with hidden_size={} and num_blocks={}; ".format(*config._made_for)
            + f"{type(model).__name__} has {found[0]} and {found[1]}. Load it onto its base model"
            + (f" ({config.base_model_name_or_path})." if config.base_model_name_or_path else ".")
        )
    config.hidden_size, config.num_blocks = found


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
