"""Every method tried on every model before anything is loaded: does it fit, how large is it, which rank matches it?

A model on torch's meta device has all the modules and shapes and no weights.
"""

import json
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from peft import get_peft_config, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from peft_steer.utils.errors import UsageError, usage_errors

from .plan import FULL, Contender, Grid, Method, Model, peft_fields


def contenders(grid: Grid) -> tuple[list[Contender], list[str]]:
    """The grid's methods as they will be trained, and a line about each rank that was matched, or could not be.

    Raises:
        UsageError: If a method does not fit a model, naming both, or if a model's configuration cannot be loaded.
    """
    entrants, remarks = [], []
    for model in grid.models:
        budget = None
        if grid.match is not None:
            reference = next(method for method in grid.methods if method.name == grid.match)
            budget = _size(model, reference, reference.variants()[0])
            if budget is None:
                raise UsageError(f"match: the size of {grid.match!r} cannot be known before {model.name} is loaded")
        for method in grid.methods:
            configs = method.variants()
            if method.matched and budget:
                configs, remark = _matched(model, method, configs, budget)
                remarks.append(f"{model.name}: {method.name}: {remark}")
            sizes = tuple(_size(model, method, config) for config in configs)
            entrants.append(Contender(model, method, tuple(configs), sizes))
    return entrants, remarks


def meta_model(source: str) -> PreTrainedModel:
    """A model of which only the configuration is read, without memory for its weights."""
    with usage_errors(f"{source}: "):
        config = AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _size(model: Model, method: Method, config: dict[str, Any]) -> int | None:
    """Trainable parameters; None if the method needs the weights to tell."""
    if config.get("peft_type") == FULL and model.quantization:
        raise UsageError(f"method {method.name!r}: quantized weights cannot be trained ({model.name})")
    try:
        return _trainable(model.source, json.dumps(config, sort_keys=True))
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise UsageError(f"method {method.name!r} does not fit {model.name}: {error}") from error


@cache
def _trainable(source: str, config: str) -> int | None:
    fields = json.loads(config)
    if not fields:
        return 0
    bare = meta_model(source)
    if fields["peft_type"] == FULL:
        return bare.num_parameters()
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again, once, when the method is trained
            return get_peft_model(bare, get_peft_config(peft_fields(fields))).get_nb_trainable_parameters()[0]
    except (NotImplementedError, RuntimeError) as error:
        if "meta tensor" in str(error):
            return None
        raise


def _matched(
    model: Model, method: Method, variants: list[dict[str, Any]], budget: int
) -> tuple[list[dict[str, Any]], str]:
    """The variants with the rank whose number of parameters is nearest to `budget`, and what to say about it."""
    field = method.matched
    assert field is not None

    def size(variant: dict[str, Any], rank: int) -> int:
        count = _size(model, method, {**variant, field: rank})
        if count is None:
            raise UsageError(
                f"method {method.name!r}: its size cannot be known before {model.name} is loaded, so `match` cannot "
                f"choose; give its {field}"
            )
        return count

    chosen, said = [], []
    for variant in variants:
        rank = _nearest(partial(size, variant), budget)
        if rank is None:
            return variants, f"its size does not depend on {field}, so there is nothing to match"
        chosen.append({**variant, field: rank})
        count = size(variant, rank)
        said.append(f"{field}={rank} ({count:,} parameters, {count / budget:.2f} x {budget:,})")
    return chosen, "; ".join(dict.fromkeys(said))


def _nearest(size: Callable[[int], int], budget: int) -> int | None:
    """The integer from 1 on whose `size`, which grows with it, is the nearest to `budget`; None if it is constant."""
    step = size(2) - size(1)
    if step == 0:
        return None
    guess = max(1, round(1 + (budget - size(1)) / step))  # most sizes are proportional to the rank
    if abs(size(guess) - budget) <= step / 2 or guess == 1:
        return guess
    low, high = 1, 2
    while size(high) < budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) < budget else (low, middle)
    return min((low, high), key=lambda rank: abs(size(rank) - budget))
