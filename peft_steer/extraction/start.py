"""Vectors from contrastive texts as the values of an adapter: to be used as they are, or to be trained further."""

from collections.abc import Sequence
from typing import cast

import torch
from peft import PeftModel, PeftType
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_steer import SteerConfig
from peft_steer.sites import Block
from peft_steer.tuners.steer.injection import resolve_sites
from peft_steer.tuners.steer.layer import CHILD, INPUT_CHILD

from .directions import direction, with_norm
from .pairs import Text
from .states import collect


def initialize_vectors(
    model: PeftModel,
    positive: Sequence[str],
    negative: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    method: str = "mean",
    tokens: str = "last",
    norm: str = "own",
    batch_size: int = 8,
    adapter_name: str = "default",
) -> None:
    """Sets the vectors of an adapter of kind `"vector"` to what tells `positive` from `negative` texts in the base.

    As PEFT's data-driven starts of LoRA: make the adapter, call this, then train it, or use it as it is.

    Args:
        model: The adapter on its base, of any precision. Other adapters do not act.
        positive, negative: Texts in pairs, `positive[i]` with `negative[i]`.
        tokenizer: The base's.
        method: `"mean"`, `"pca_centred"` or `"pca_uncentred"`; see `peft_steer/extraction/directions.py`.
        tokens: The state of a text: at its `"last"` token, or the `"mean"` over its tokens.
        norm: The vector's: `"own"` (that of the method), `"unit"`, or `"states"` (the mean norm of the states there).
        batch_size: Texts at a time.
        adapter_name: The adapter.

    Raises:
        ValueError: If the adapter has no vectors, the texts are not pairs, or their states do not differ.

    Example:

        ```py
        >>> model = get_peft_model(base, SteerConfig(kind="vector", layers_to_transform=[14], task_type="CAUSAL_LM"))
        >>> initialize_vectors(model, ["I love this"], ["I hate this"], tokenizer)
        >>> model.base_model.set_scale("default", 2.0)
        ```
    """
    if len(positive) != len(negative) or not positive:
        raise ValueError(f"positive and negative must be pairs of texts, not {len(positive)} and {len(negative)}")
    texts = [[Text(tokenizer(text).input_ids) for text in side] for side in (positive, negative)]
    places = vector_places(model, adapter_name)
    states = collect_pairs(model, texts[0], texts[1], places, tokens, batch_size)
    for name, (h_positive, h_negative) in states.items():
        v = direction(h_positive, h_negative, method)
        set_vector(model, name, with_norm(v, norm, torch.cat([h_positive, h_negative])), adapter_name)


def vector_places(model: PeftModel, adapter_name: str = "default") -> dict[str, tuple[Block, str]]:
    """Block and site of every vector of an adapter, by the steered module's name.

    Raises:
        ValueError: If the adapter has no vectors.
    """
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, SteerConfig) or config.kind != "vector" or not config.share_weights:
        raise ValueError(
            f"adapter {adapter_name!r} has no vectors to set: make it with SteerConfig(kind='vector'); there are "
            f"{ {name: getattr(c, 'kind', PeftType(c.peft_type).value) for name, c in model.peft_config.items()} }"
        )
    sites = resolve_sites(model.get_base_model(), config)
    return {name: (site.block, site.place) for name, site in sites.items()}


def collect_pairs(
    model: PeftModel,
    positive: Sequence[Text],
    negative: Sequence[Text],
    places: dict[str, tuple[Block, str]],
    tokens: str,
    batch_size: int,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The states of both sides at `places`, each `(pairs, d)`, of the base alone, by the steered module's name."""
    sides = {}
    base = cast(PreTrainedModel, model.get_base_model())
    with model.disable_adapter():
        for site in dict.fromkeys(site for _, site in places.values()):
            blocks = {name: block for name, (block, at) in places.items() if at == site}
            both = [*positive, *negative]
            states = collect(base, both, list(blocks.values()), site, tokens, batch_size)
            for name, block in blocks.items():
                sides[name] = tuple(states[block.index].split(len(positive)))
    return {name: sides[name] for name in places}


@torch.no_grad()
def set_vector(model: PeftModel, name: str, v: torch.Tensor, adapter_name: str = "default") -> None:
    """Sets the vector at the module `name` to `v`, `(d,)`."""
    module = model.get_base_model().get_submodule(name)
    children = (getattr(module, child, None) for child in (CHILD, INPUT_CHILD))
    layer = next(layer for layer in children if layer is not None and adapter_name in layer.steer_edit)
    layer.steer_edit[adapter_name].v.copy_(v)
