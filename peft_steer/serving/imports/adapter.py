"""Another tool's adapter as one of ours, on a base of which only the shapes are needed."""

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from peft_steer import SteerConfig
from peft_steer.sites import hidden_size, select_blocks, site_module
from peft_steer.tuners.steer.injection import resolve_sites
from peft_steer.tuners.steer.layer import CHILD

from .foreign import Foreign


def make_adapter(base: str, foreign: Foreign, scale: float = 1.0, name: str | None = None) -> PeftModel:
    """An adapter with `foreign`'s parameters, on the shapes of the model `base`, to be saved.

    Args:
        base: Where the model's configuration is.
        foreign: The parameters.
        scale: The strength to record.
        name: What the user calls the model, and the adapter's file will; by default `base`.

    Raises:
        ValueError: If it was made for a model of another width or with fewer blocks, or the base has no such place.
    """
    name = name or base
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    blocks = select_blocks(model, layers_to_transform=list(foreign.states))
    places = {block.index: site_module(block, foreign.site)[0] for block in blocks}
    if len(places) < len(blocks):
        raise ValueError(f"{name} has several stacks of blocks, and the file does not say which it is for")
    norm = next((place for place in places.values() if "norm" in place.rpartition(".")[2].lower()), None)
    if norm and foreign.site != "block":
        raise ValueError(
            f"site={foreign.site!r} is behind the norm {norm!r} here, and in other tools before it; import a file "
            "made for the block's output"
        )
    width, given = hidden_size(model, blocks[0].name), _width(foreign)
    if width != given:
        raise ValueError(f"the vectors are of width {given}, and {name} has {width}: they are of another model")
    ranks = foreign.ranks
    r = max(ranks.values(), default=8)
    config = SteerConfig(
        kind=foreign.kind,
        site=foreign.site,
        r=r,
        rank_pattern={places[block]: rank for block, rank in ranks.items() if rank != r},
        activation=foreign.activation,
        positions=foreign.positions,
        share_weights=foreign.tied,
        layers_to_transform=sorted(foreign.states),
        scale=scale,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    config.base_model_name_or_path = name
    for site in resolve_sites(model, config).values():
        edit = getattr(site.module, CHILD).steer_edit["default"]
        edit.load_state_dict(foreign.states[site.block.index])
    return adapted


def _width(foreign: Foreign) -> int:
    widths = {x.shape[-1] for state in foreign.states.values() for key, x in state.items() if _reads_states(key)}
    if len(widths) != 1:
        raise ValueError(f"the tensors have different widths, {sorted(widths)}")
    return widths.pop()


def _reads_states(key: str) -> bool:
    return key.rpartition(".")[2] != "b"  # `b` has the width of the rank
