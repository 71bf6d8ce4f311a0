"""Which of TRL's trainers trains a method, and with which fields.

`train` stands in a grid, in its tasks and in its methods; later ones win. A block `sft:`, `grpo:` or `dpo:` in it
holds for that trainer alone, so that one table may have rows of several.
"""

import dataclasses
import warnings
from collections.abc import Iterable
from functools import cache
from typing import Any

from peft_steer.utils.devices import has_accelerator
from peft_steer.utils.errors import suggest


TRAINERS = ("sft", "grpo", "dpo")
# What the bench sets itself, so a grid's `train` may not.
_OURS = {"output_dir", "learning_rate", "seed", "save_strategy", "report_to", "use_cpu", "completion_only_loss"}


def used_trainers(raw: dict[str, Any]) -> list[str]:
    """The trainers that a grid's methods name, or that the grid names for them.

    Raises:
        ValueError: If there is no such trainer.
    """
    methods = [method for method in raw["methods"] if isinstance(method, dict)]
    named = {"trainer": raw.get("trainer", "sft")}
    named |= {f"method {m.get('name')!r}: trainer": m["trainer"] for m in methods if "trainer" in m}
    for where, name in named.items():
        if name not in TRAINERS:
            raise ValueError(f"{where}: {name!r} is not one of {TRAINERS}")
    used = {m.get("trainer", named["trainer"]) for m in methods if m.get("peft_type") != "base"}
    return sorted(used, key=TRAINERS.index) or ["sft"]


def check_layer(where: str, raw: Any, used: Iterable[str]) -> dict[str, Any]:
    """One `train` of a grid, its keys checked: each is a field of every trainer that the grid uses, or in a block.

    Raises:
        ValueError: If it is not a mapping, or a key is unknown, or set by the bench.
    """
    raw = _mapping(where, raw)
    used = list(dict.fromkeys(used))
    for key, value in raw.items():
        if key in TRAINERS:
            for inner in _mapping(f"{where}: {key}", value):
                _check_key(f"{where}: {key}", inner, key)
            continue
        knowing = [trainer for trainer in used if key in _fields(trainer)]
        if knowing and len(knowing) < len(used):
            other = next(trainer for trainer in used if trainer not in knowing)
            raise ValueError(
                f"{where}: {key}: {other}, which this grid uses too, has no such field; put it into a block "
                f"`{knowing[0]}:`"
            )
        if not knowing:
            _check_key(where, key, used[0], blocks=True)
    return raw


def merge(trainer: str, *layers: dict[str, Any]) -> dict[str, Any]:
    """The fields that hold for `trainer`: later layers win, and in one layer the trainer's block."""
    fields: dict[str, Any] = {}
    for layer in layers:
        fields |= {key: value for key, value in layer.items() if key not in TRAINERS}
        fields |= layer.get(trainer, {})
    return fields


def check_fields(where: str, trainer: str, fields: dict[str, Any]) -> None:
    """Raises a `ValueError` if TRL's config of `trainer` refuses the values."""

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers deprecates fields that TRL fills in
            config_class(trainer)(
                output_dir="unused",
                report_to="none",
                use_cpu=not has_accelerator(),
                **{"bf16": False, **fields},
            )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: train: {error}") from error


def config_class(trainer: str) -> type:
    """TRL's config of a trainer."""
    import trl  # slow, and the plan needs none of it

    return getattr(trl, f"{trainer.upper()}Config")


@cache
def _fields(trainer: str) -> frozenset[str]:
    return frozenset(field.name for field in dataclasses.fields(config_class(trainer)) if field.init) - _OURS


def _mapping(where: str, raw: Any) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: expected dict, got {raw!r}")
    return raw


def _check_key(where: str, key: Any, trainer: str, blocks: bool = False) -> None:
    known = [*_fields(trainer), *(TRAINERS if blocks else ())]
    if key not in known:
        reason = "is set by the bench itself" if key in _OURS else "unknown key"
        raise ValueError(f"{where}: {key}: {reason}{suggest(str(key), known)}")
