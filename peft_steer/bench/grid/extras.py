"""What a grid may say beyond models, tasks and methods: how it chooses, what else it scores, what was published."""

from typing import Any

from peft_steer.utils.errors import suggest

from .plan import Grid, Reference
from .trainers import check_fields, check_layer, merge


PROMPT = ("num_fewshot", "apply_chat_template", "system_instruction")  # of a task, as lm-eval's flags


def parse_choose(raw: Any, trainers: list[str]) -> dict[str, Any]:
    """`choose: {limit, train}`: what is other where a rate or a variant is chosen."""
    raw = _mapping("choose", raw, ("limit", "train"))
    if "limit" in raw:
        parse_count("choose: limit", raw["limit"], least=1)
    if "train" in raw:
        check_layer("choose: train", raw["train"], trainers)
    return raw


def parse_retention(raw: Any) -> tuple[dict[str, Any], ...]:
    """`retention: [TASK, {name: TASK, limit: N, metadata: {...}}]`."""
    kept: list[dict[str, Any]] = []
    for index, entry in enumerate(_list("retention", raw)):
        where = f"retention[{index}]"
        fields = _mapping(where, entry if isinstance(entry, dict) else {"name": entry}, ("name", "limit", "metadata"))
        name = _text(f"{where}: name", fields.get("name"))
        limit = fields.get("limit")
        limit = None if limit is None else parse_count(f"{where}: limit", limit, least=1)
        kept.append({"name": name, "limit": limit, "metadata": _mapping(f"{where}: metadata", fields.get("metadata"))})
    names = [str(entry["name"]) for entry in kept]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"retention: the names {sorted(twice)} occur twice")
    return tuple(kept)


def parse_reference(raw: Any) -> tuple[Reference, ...]:
    """`reference: [{method, task, score, source, n, model}]`."""
    references = []
    for index, entry in enumerate(_list("reference", raw)):
        where = f"reference[{index}]"
        fields = _mapping(where, entry, ("method", "task", "score", "source", "n", "model"))
        score = fields.get("score")
        if isinstance(score, bool) or not isinstance(score, (int, float)):
            raise ValueError(f"{where}: score: {score!r} is not a number")
        if fields.get("n") is not None:
            parse_count(f"{where}: n", fields["n"], least=1)
        for name in ("method", "task", "source", *(["model"] if fields.get("model") is not None else [])):
            _text(f"{where}: {name}", fields.get(name))
        references.append(Reference(**{**fields, "score": float(score)}))
    return tuple(references)


def parse_rewards(where: str, raw: Any, trainers: list[str]) -> tuple[str, ...]:
    """`rewards:` of a task."""
    if raw is None:
        return ()
    if "grpo" not in trainers:
        raise ValueError(f"{where}: rewards: no method is trained with `trainer: grpo`; remove it")
    return tuple(_text(f"{where}: rewards", name) for name in (_list(f"{where}: rewards", raw)))


def parse_prompt(where: str, raw: dict[str, Any]) -> dict[str, Any]:
    """How a task makes its prompts, where it differs from what the task itself says."""
    kinds: dict[str, type] = {"num_fewshot": int, "apply_chat_template": bool, "system_instruction": str}
    for name in PROMPT:
        value = raw.get(name)
        if name in raw and (
            not isinstance(value, kinds[name]) or isinstance(value, bool) is not (kinds[name] is bool)
        ):
            raise ValueError(f"{where}: {name}: expected {kinds[name].__name__}, got {value!r}")
    return {name: raw[name] for name in PROMPT if name in raw}


def parse_count(where: str, value: Any, least: int = 0) -> int:
    """A whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where}: expected int, got {value!r}")
    if value < least:
        raise ValueError(f"{where}: {value} is below {least}")
    return value


def check_extras(grid: Grid) -> None:
    """Checks what needs the whole grid: every trainer's fields as they meet, and the names that others refer to.

    Raises:
        ValueError: For what could not be run or would be ignored.
    """
    trained = [method for method in grid.methods if method.config]
    chooses = any(len(m.variants()) * len(m.learning_rates) > 1 for m in trained)
    if grid.choose and not chooses:
        raise ValueError("choose: no method has several learning rates or a sweep, so nothing is chosen; remove it")
    for task in grid.tasks:
        for method in trained:
            where = f"method {method.name!r}" + (f" on {task.name}" if len(grid.tasks) > 1 else "")
            fields = merge(method.trainer, grid.train, task.train, method.train)
            check_fields(where, method.trainer, fields)
            check_fields(
                f"{where}, choose", method.trainer, {**fields, **merge(method.trainer, grid.choose.get("train", {}))}
            )
    if grid.retention and len(trained) == len(grid.methods):
        raise ValueError("retention: is compared with the untrained model; add a method with `peft_type: base`")
    tasks, methods = [task.name for task in grid.tasks], [method.name for method in grid.methods]
    for index, entry in enumerate(grid.reference):
        for key, value, known in (("task", entry.task, tasks), ("method", entry.method, methods)):
            if value not in known:
                raise ValueError(f"reference[{index}]: {key}: no {key} has the name {value!r}{suggest(value, known)}")
        if entry.model is None and len(grid.models) > 1:
            raise ValueError(f"reference[{index}]: model: the grid has {len(grid.models)} models; name one")


def _mapping(where: str, raw: Any, allowed: tuple[str, ...] | None = None) -> dict[str, Any]:
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: expected dict, got {raw!r}")
    for key in raw:
        if allowed is not None and key not in allowed:
            raise ValueError(f"{where}: {key}: unknown key{suggest(str(key), allowed)}")
    return raw


def _list(where: str, raw: Any) -> list[Any]:
    raw = [] if raw is None else raw
    if not isinstance(raw, list):
        raise ValueError(f"{where}: expected list, got {raw!r}")
    return raw


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: expected str, got {value!r}")
    return value
