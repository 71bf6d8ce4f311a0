"""Cells and results as what a report shows: a row a cell, and the contenders of every model and task."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from ..grid.plan import Cell
from ..statistics import Comparison, Scores, Summary, compare_all, summarize, tie_letters


Result = dict[str, Any]
COSTS = (
    "trainable",
    "parameters",
    "train_seconds",
    "train_tokens",
    "tokens_per_second",
    "peak_bytes",
    "saved_bytes",
    "adapter_bytes",
    "decode_ratio",
    "forgetting",
    "kl",
    "length",
    "rollout_tokens_per_second",
    "optimizer_bytes",
    "optimizer_share",
)


@dataclass(frozen=True)
class Row:
    """A contender: a method with its choice of learning rate (and config), over its seeds.

    Attributes:
        label: Names it among the rows of its setting.
        choice: The learning rate, and the fields of the config that the method's sweep varied; "" for the base.
        planned: Trainings that were to be done. `losses` has an entry for each that was done, by seed.
        scores, summary: None if all trainings failed.
        costs: Means over seeds; NaN for what does not exist.
        against_best: The comparison with the setting's best row; None for the best itself and for failed rows.
        letters: Rows that share one are a tie.
        trainer: What trained it; "" for the base.
        curves: What the trainer recorded over its steps, such as the reward: by name and seed.
        retention: The scores of the retained tasks, by name.
        forgetting_error: Standard error of the mean forgetting over seeds; NaN with one.
    """

    method: str
    label: str
    choice: str
    planned: int
    losses: dict[int, list[tuple[int, float]]]
    scores: Scores | None
    summary: Summary | None
    costs: dict[str, float]
    against_best: Comparison | None = None
    letters: str = ""
    trainer: str = ""
    curves: dict[str, dict[int, list[tuple[int, float]]]] = field(default_factory=dict)
    retention: dict[str, Scores] = field(default_factory=dict)
    forgetting_error: float = math.nan

    @property
    def mean(self) -> float:
        """The mean score; NaN if all trainings failed."""
        return math.nan if self.summary is None else self.summary.mean

    @property
    def n_seeds(self) -> int:
        """Trainings that have a score."""
        return 0 if self.scores is None else len(self.scores.values)


@dataclass(frozen=True)
class Setting:
    """One model and one task.

    Attributes:
        split: The one that the rows are about: test, or validation if that is all that there is.
        comparisons: Every pair of rows.
        sweep: The validation scores, one row a choice: `method`, `variant`, `learning_rate`, `score`, `stderr`,
            `chosen`, in the order of the grid. Empty without a sweep.
    """

    model: str
    precision: str
    task: str
    split: str
    metric: str
    rows: list[Row]
    comparisons: list[Comparison]
    sweep: pd.DataFrame = field(repr=False)

    @property
    def title(self) -> str:
        return f"{self.model}, {self.precision}; {self.task}, {self.split} split"

    @property
    def done(self) -> list[Row]:
        return [row for row in self.rows if row.summary is not None]


def cell_frame(cells: Sequence[Cell], results: Sequence[Result]) -> pd.DataFrame:
    """One row a cell, with every number. What a cell does not have is NaN; its error is "" if it has none."""
    return pd.DataFrame([_cell_row(cell, result) for cell, result in zip(cells, results, strict=True)])


def settings(cells: Sequence[Cell], results: Sequence[Result]) -> list[Setting]:
    """The comparisons, by model and task in the order of the cells.

    The best row is that with the highest score. All pairs of a setting are one family for the correction of p values.
    """
    members: dict[tuple[str, str, str], list[tuple[Cell, Result]]] = {}
    for cell, result in zip(cells, results, strict=True):
        members.setdefault((cell.model, _precision(cell), cell.task), []).append((cell, result))
    return [_setting(*key, pairs) for key, pairs in members.items()]


def rate_text(rate: float) -> str:
    return f"{rate:g}" if rate else ""


def _precision(cell: Cell) -> str:
    if not cell.quantization:
        return cell.dtype
    fields = ", ".join(f"{k}={v}" for k, v in cell.quantization.items())
    return f"{cell.dtype} ({fields})"


def _cell_row(cell: Cell, result: Result) -> dict[str, Any]:
    costs = _costs(result)
    forgetting = result.get("forgetting") or {}
    return {
        "model": cell.model,
        "precision": _precision(cell),
        "task": cell.task,
        "split": cell.split,
        "method": cell.name,
        "trainer": cell.trainer if cell.config else "",
        "learning_rate": cell.learning_rate or math.nan,
        "seed": cell.seed,
        "status": result["status"],
        "metric": result.get("metric", ""),
        "score": result.get("score", math.nan),
        "stderr": _number(result.get("stderr")),
        "n": result.get("n", math.nan),
        **costs,
        "forgetting_before": _number(forgetting.get("before")),
        "forgetting_after": _number(forgetting.get("after")),
        "final_loss": result["loss"][-1][1] if result.get("loss") else math.nan,
        "error": result.get("error", ""),
        "config": json.dumps(cell.config),
        **result.get("environment", {}),
        "key": cell.key,
    }


def _costs(result: Result) -> dict[str, float]:
    seconds, tokens, forgetting = (result.get(name) for name in ("train_seconds", "train_tokens", "forgetting"))
    derived = {
        "tokens_per_second": tokens / seconds if tokens and seconds else None,
        "forgetting": forgetting["after"] - forgetting["before"] if forgetting else None,
    }
    return {name: _number({**result, **derived}.get(name)) for name in COSTS}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan  # lm-eval says "N/A" where it has no error


def _setting(model: str, precision: str, task: str, pairs: list[tuple[Cell, Result]]) -> Setting:
    split = "test" if any(cell.split == "test" for cell, _ in pairs) else "validation"
    varied = _varied_fields([cell for cell, _ in pairs])
    entries: dict[tuple[str, str], list[tuple[Cell, Result]]] = {}
    for name in dict.fromkeys(cell.name for cell, _ in pairs):
        shown = [pair for pair in pairs if pair[0].name == name and pair[0].split == split]
        for cell, result in shown:
            entries.setdefault((name, _choice(cell, varied)), []).append((cell, result))
        if not shown:  # every run of its sweep failed
            entries[name, ""] = []
    names = [name for name, _ in entries]
    rows = [
        _row(name, choice, name if names.count(name) == 1 or not choice else f"{name}, {choice}", trainings)
        for (name, choice), trainings in entries.items()
    ]
    done = [row for row in rows if row.scores is not None]
    comparisons = compare_all([row.scores for row in done if row.scores is not None])
    ranked = sorted(done, key=lambda row: -row.mean)
    letters = tie_letters([row.label for row in ranked], comparisons)
    best = ranked[0].label if ranked else None
    against = {c.second if c.first == best else c.first: c for c in comparisons if best in (c.first, c.second)}
    rows = [
        Row(**{**vars(row), "against_best": against.get(row.label), "letters": letters.get(row.label, "")})
        for row in rows
    ]
    metric = next((result["metric"] for _, result in pairs if result["status"] == "done"), "score")
    return Setting(model, precision, task, split, metric, rows, comparisons, _sweep(pairs, split, varied))


def _row(method: str, choice: str, label: str, trainings: list[tuple[Cell, Result]]) -> Row:
    done = [(cell, result) for cell, result in trainings if result["status"] == "done"]
    scores = Scores.gather(label, [result["items"] for _, result in done]) if done else None
    costs = pd.DataFrame([_costs(result) for _, result in done], columns=list(COSTS))
    return Row(
        method=method,
        label=label,
        choice=choice,
        planned=len(trainings),
        losses={cell.seed: result["loss"] for cell, result in done if result["loss"]},
        scores=scores,
        summary=summarize(scores) if scores else None,
        costs=costs.mean().to_dict(),
        forgetting_error=float(costs["forgetting"].sem()),
        trainer=next((cell.trainer for cell, _ in trainings if cell.config), ""),
        curves=_curves(done),
        retention=_retention(label, done),
    )


def _curves(done: list[tuple[Cell, Result]]) -> dict[str, dict[int, list[tuple[int, float]]]]:
    curves: dict[str, dict[int, list[tuple[int, float]]]] = {}
    for cell, result in done:
        for name, points in (result.get("curves") or {}).items():
            if points:
                curves.setdefault(name, {})[cell.seed] = points
    return curves


def _retention(label: str, done: list[tuple[Cell, Result]]) -> dict[str, Scores]:
    names = dict.fromkeys(name for _, result in done for name in (result.get("retention") or {}))
    return {name: Scores.gather(label, [result["retention"][name]["items"] for _, result in done]) for name in names}


def _varied_fields(cells: list[Cell]) -> dict[str, list[str]]:
    """By method, the fields of its config that are not the same in all its cells."""
    varied = {}
    for name in {cell.name for cell in cells}:
        configs = [cell.config for cell in cells if cell.name == name]
        keys = dict.fromkeys(key for config in configs for key in config)
        varied[name] = [key for key in keys if any(c.get(key) != configs[0].get(key) for c in configs)]
    return varied


def _variant(cell: Cell, varied: dict[str, list[str]]) -> str:
    return ", ".join(f"{key}={cell.config.get(key)}" for key in varied[cell.name])


def _choice(cell: Cell, varied: dict[str, list[str]]) -> str:
    return ", ".join(part for part in (rate_text(cell.learning_rate), _variant(cell, varied)) if part)


def _sweep(pairs: list[tuple[Cell, Result]], split: str, varied: dict[str, list[str]]) -> pd.DataFrame:
    tested = {(cell.name, _choice(cell, varied)) for cell, _ in pairs if cell.split == "test"}

    def lines() -> Iterator[dict[str, Any]]:
        tried: dict[tuple[str, str], list[tuple[Cell, Result]]] = {}
        for cell, result in pairs:
            if cell.split == "validation" and cell.config:
                tried.setdefault((cell.name, _choice(cell, varied)), []).append((cell, result))
        for (name, choice), trainings in tried.items():
            cell = trainings[0][0]
            done = [result for _, result in trainings if result["status"] == "done"]
            yield {
                "method": name,
                "variant": _variant(cell, varied),
                "learning_rate": cell.learning_rate,
                "score": np.mean([result["score"] for result in done]) if done else math.nan,
                "stderr": np.mean([_number(result["stderr"]) for result in done]) if done else math.nan,
                "chosen": split == "test" and (name, choice) in tested,
            }

    return pd.DataFrame(
        list(lines()), columns=["method", "variant", "learning_rate", "score", "stderr", "chosen"]
    ).astype({"score": float, "stderr": float, "chosen": bool})
