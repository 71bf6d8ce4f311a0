"""A grid file, read and checked as a whole before anything is loaded."""

import dataclasses
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import peft
from transformers import BitsAndBytesConfig

import peft_steer  # noqa: F401  (registers the tuner types)
from peft_steer.utils.errors import suggest, usage_errors
from peft_steer.utils.yaml import read_yaml

from .extras import (
    PROMPT,
    check_extras,
    parse_choose,
    parse_count,
    parse_prompt,
    parse_reference,
    parse_retention,
    parse_rewards,
)
from .plan import FULL, STEER_RATE, Grid, Method, Model, Task, peft_fields
from .trainers import check_layer, used_trainers


_DTYPES = ("float32", "bfloat16", "float16")
_SPLITS = ("validation", "test")
_GRID_KEYS = (
    *("model", "models", "task", "tasks", "methods", "dtype", "quantization", "gpus", "processes"),
    *("split", "limit", "eval_batch_size", "seeds", "trainer", "train", "match", "choose"),
    *("forgetting", "retention", "kl_prompts", "reference"),
)
# The paper's settings (arXiv 2603.00425): AdamW is TRL's default; an effective batch of 16.
PAPER_TRAIN = {
    "per_device_train_batch_size": 16,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.03,  # below 1: of all steps
    "weight_decay": 0.0,
}
_JOINT_TRAIN = {"lr_scheduler_type": "cosine", "warmup_steps": 0.06}


def paper_rates(peft_type: str) -> tuple[float, ...]:
    """Five learning rates over the paper's range: for steering, for full fine-tuning, and LoRA's for all others."""
    low, high = {"STEER": (5e-4, 5e-3), FULL: (5e-6, 1e-4)}.get(peft_type, (5e-5, 1.5e-3))
    return tuple(float(f"{rate:.2g}") for rate in np.geomspace(low, high, 5))


def load_grid(path: str | Path, model: str | None = None) -> Grid:
    """Reads and checks a grid.

    Args:
        path: The YAML file. Paths in it are relative to it.
        model: A directory or hub id in the place of the file's only model.

    Raises:
        UsageError: For anything that cannot be run as written, naming the file, the key and a way out.
    """
    path = Path(path)
    raw = read_yaml(path)
    with usage_errors(f"{path}: ", kinds=(ValueError, TypeError)):
        return _grid(raw, model, path.parent)


def _grid(raw: Any, model: str | None, folder: Path) -> Grid:
    if not isinstance(raw, dict):
        raise ValueError(f"a grid has the keys {list(_GRID_KEYS)}, this is {raw!r}")
    _check_keys("", raw, _GRID_KEYS)
    if not raw.get("methods"):
        raise ValueError("methods: is missing")
    models = _either(raw, "model")
    if model is not None:
        if len(models) > 1:
            raise ValueError(f"models: --model replaces the only model, here are {len(models)}")
        models = [{**models[0], "name": model} if isinstance(models[0], dict) else model]
    trainers = used_trainers(raw)
    grid = Grid(
        models=tuple(_model(f"models[{i}]", m, raw) for i, m in enumerate(models)),
        tasks=tuple(_task(f"tasks[{i}]", t, raw, trainers) for i, t in enumerate(_either(raw, "task"))),
        methods=tuple(_method(i, m, raw, trainers) for i, m in enumerate(_typed("methods", raw["methods"], list))),
        split=_one_of("split", raw.get("split", "test"), _SPLITS),
        eval_batch_size=_positive("eval_batch_size", raw.get("eval_batch_size", 64)),
        seeds=tuple(_typed("seeds", s, int) for s in _listed("seeds", raw.get("seeds", [0, 1, 2]))),
        train={**PAPER_TRAIN, **check_layer("train", raw.get("train", {}), trainers)},
        match=None if raw.get("match") is None else _typed("match", raw["match"], str),
        forgetting=_forgetting(raw.get("forgetting"), folder),
        choose=parse_choose(raw.get("choose"), trainers),
        retention=parse_retention(raw.get("retention")),
        kl_prompts=parse_count("kl_prompts", raw.get("kl_prompts", 0)),
        reference=parse_reference(raw.get("reference")),
    )
    _check_distinct(grid)
    check_extras(grid)
    names = [method.name for method in grid.methods]
    if grid.match is not None and grid.match not in names:
        raise ValueError(f"match: no method has the name {grid.match!r}{suggest(grid.match, names)}")
    return grid


def _either(raw: dict, key: str) -> list[Any]:
    """The list under the plural of `key`, or the one thing under `key`."""
    plural = f"{key}s"
    if raw.get(key) and raw.get(plural):
        raise ValueError(f"{key} and {plural}: give one of them")
    if not (raw.get(key) or raw.get(plural)):
        raise ValueError(f"{key}: is missing")
    return [raw[key]] if raw.get(key) else _listed(plural, _typed(plural, raw[plural], list))


def _model(where: str, raw: Any, grid: dict) -> Model:
    raw = dict(raw) if isinstance(raw, dict) else {"name": raw}
    _check_keys(where, raw, ("name", "dtype", "quantization", "gpus", "processes"))
    raw = {**{k: grid[k] for k in ("dtype", "quantization", "gpus", "processes") if k in grid}, **raw}
    name = _typed(f"{where}: name", raw.get("name"), str)
    quantization = _typed(f"{where}: quantization", raw.get("quantization") or {}, dict)
    _check_keys(
        f"{where}: quantization", quantization, set(inspect.signature(BitsAndBytesConfig).parameters) - {"kwargs"}
    )
    try:
        BitsAndBytesConfig(**quantization)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: quantization: {error}") from error
    gpus = raw.get("gpus", 0)
    if isinstance(gpus, bool) or not isinstance(gpus, (int, float)) or gpus < 0:
        raise ValueError(f"{where}: gpus: must be a number of at least 0, not {gpus!r}")
    return Model(
        name=name,
        source=name,
        dtype=_one_of(f"{where}: dtype", raw.get("dtype", "float32"), _DTYPES),
        quantization=quantization,
        gpus=gpus,
        processes=_positive(f"{where}: processes", raw.get("processes", 1)),
    )


def _task(where: str, raw: Any, grid: dict, trainers: list[str]) -> Task:
    raw = dict(raw) if isinstance(raw, dict) else {"name": raw}
    _check_keys(where, raw, ("name", "limit", "train", "metadata", "rewards", *PROMPT))
    limit = raw.get("limit", grid.get("limit"))
    return Task(
        name=_typed(f"{where}: name", raw.get("name"), str),
        limit=None if limit is None else _positive("limit", limit),
        train=check_layer(f"{where}: train", raw.get("train", {}), trainers),
        metadata=_typed(f"{where}: metadata", raw.get("metadata", {}), dict),
        rewards=parse_rewards(where, raw.get("rewards"), trainers),
        prompt=parse_prompt(where, raw),
    )


def _method(index: int, raw: Any, grid: dict, trainers: list[str]) -> Method:
    where = f"methods[{index}]"
    raw = dict(_typed(where, raw, dict))
    where = f"method {raw.get('name', index)!r}"
    name = _typed(f"{where}: name", raw.pop("name", None), str)
    type_name = _typed(f"{where}: peft_type", raw.pop("peft_type", None), str)
    if type_name == "base":
        _check_keys(where, raw, ())
        return Method(name, {}, (0.0,))
    known = {member.value: config for member, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if type_name not in (*known, FULL):
        raise ValueError(f"{where}: peft_type: unknown {type_name!r}{suggest(type_name, [*known, 'base', FULL])}")
    rates = raw.pop("learning_rate", list(paper_rates(type_name)))
    rates = tuple(_rate(f"{where}: learning_rate", r) for r in _listed(f"{where}: learning_rate", rates))
    trainer = raw.pop("trainer", grid.get("trainer", "sft"))
    train = check_layer(f"{where}: train", raw.pop("train", {}), [trainer])
    ours = ("name", "peft_type", "learning_rate", "trainer", "train")
    if type_name == FULL:
        _check_keys(where, raw, (), extra=ours)
        return Method(name, {"peft_type": FULL}, rates, train, trainer=trainer)
    if type_name == "JOINT_STEER_LORA":
        given = grid.get("train", {})
        train = {**{key: value for key, value in _JOINT_TRAIN.items() if key not in given}, **train}
    matched = raw.pop("matched", None)
    sweep = _typed(f"{where}: sweep", raw.pop("sweep", {}), dict)
    fields = {f.name for f in dataclasses.fields(known[type_name]) if f.init} - {"peft_type"}
    fields |= {STEER_RATE} if type_name == "JOINT_STEER_LORA" else set()
    _check_keys(where, raw, fields, extra=(*ours, "sweep", "matched"))
    _check_keys(f"{where}: sweep", sweep, fields)
    sweep = {
        key: tuple(_listed(f"{where}: sweep: {key}", _typed(f"{where}: sweep: {key}", values, list)))
        for key, values in sweep.items()
    }
    for key in sweep:
        if key in raw:
            raise ValueError(f"{where}: {key}: stands in the method and in its sweep")
    match = grid.get("match")
    if match is None or match == name:
        if matched is not None:
            reason = "the others are matched to it" if match else "the grid has no `match` that says to what"
            raise ValueError(f"{where}: matched: {reason}; remove it")
    elif matched is None and "r" in fields and "r" not in (*raw, *sweep):
        matched = "r"
    elif matched is not None and matched not in fields:
        hint = suggest(str(matched), list(fields))
        raise ValueError(f"{where}: matched: {matched!r} is not a field of {type_name}{hint}")
    elif matched in (*raw, *sweep):
        raise ValueError(f"{where}: {matched}: is given, and to be matched too; remove one")
    raw.setdefault("task_type", "CAUSAL_LM")
    method = Method(name, {"peft_type": type_name, **raw}, rates, train, sweep, matched, trainer)
    for config in method.variants():
        try:
            known[type_name](**{k: v for k, v in peft_fields(config).items() if k != "peft_type"})
            if STEER_RATE in config:
                _rate(STEER_RATE, config[STEER_RATE])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error
    return method


def _forgetting(value: Any, folder: Path) -> str | None:
    if value is None:
        return None
    path = folder / _typed("forgetting", value, str)
    if not path.is_file():
        raise ValueError(f"forgetting: there is no text file {path}")
    return str(path.resolve())


def _rate(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where}: {value!r} is not a number (write it without quotes)")
    if not 0 < value < float("inf"):
        raise ValueError(f"{where}: {value} is not above 0 and finite")
    return float(value)


def _positive(where: str, value: Any) -> int:
    if _typed(where, value, int) < 1:
        raise ValueError(f"{where}: {value} is below 1")
    return value


def _typed(where: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value


def _one_of(where: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{where}: {value!r} is not one of {choices}")
    return value


def _listed(where: str, value: Any) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError(f"{where}: the list is empty")
    return values


def _check_keys(where: str, raw: dict, allowed: Iterable[str], extra: tuple[str, ...] = ()) -> None:
    allowed = [*allowed, *extra]
    for key in raw:
        if key not in allowed:
            prefix = f"{where}: " if where else ""
            raise ValueError(f"{prefix}{key}: unknown key{suggest(str(key), allowed)}")


def _check_distinct(grid: Grid) -> None:
    for key, values in (("models", grid.models), ("tasks", grid.tasks), ("methods", grid.methods)):
        names = [value.name for value in values]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{key}: the names {sorted(twice)} occur twice")
    numbers: dict[str, tuple[float, ...]] = {"seeds": grid.seeds}
    numbers |= {f"method {method.name!r}: learning_rate": method.learning_rates for method in grid.methods}
    for key, given in numbers.items():
        if len(set(given)) < len(given):
            raise ValueError(f"{key}: {list(given)} has a value twice")
