"""What the training leaves of other tasks: the change from the untrained base, and gain against loss."""

import math
from dataclasses import dataclass, replace

import pandas as pd
from statsmodels.stats.multitest import multipletests

from ..statistics import ALPHA, Comparison, compare, summarize
from .frame import Row, Setting


@dataclass(frozen=True)
class Point:
    """A row of the setting in the plane of gain and loss, with the half-widths of their 95 % intervals (of the
    forgetting of plain text: its standard error over seeds).

    Attributes:
        axis: What `loss` is.
        best: Whether no other row gains at least as much and loses no more, one of them truly.
    """

    method: str
    label: str
    axis: str
    gain: float
    loss: float
    gain_error: float
    loss_error: float
    best: bool = False


def changes(setting: Setting) -> dict[str, dict[str, Comparison]]:
    """By retained task and row: the trained model less the base, paired by item. Empty without the base.

    The rows of a task are one family for Holm's correction.
    """
    base = _base(setting)
    if base is None:
        return {}
    by_task = {}
    for task, before in base.retention.items():
        made = {row.label: compare(row.retention[task], before) for row in _trained(setting) if task in row.retention}
        if made:
            corrected = multipletests([c.p for c in made.values()], alpha=ALPHA, method="holm")[1]
            by_task[task] = {
                label: replace(c, p_holm=float(p)) for (label, c), p in zip(made.items(), corrected, strict=True)
            }
    return by_task


def retention_table(setting: Setting) -> pd.DataFrame:
    """A line a row of the setting: the base's scores, then each change with its p value. Empty without changes."""
    base, changed = _base(setting), changes(setting)
    if base is None:
        return pd.DataFrame()
    lines = [{"method": base.label, **{task: f"{summarize(base.retention[task]).mean:.3f}" for task in changed}}]
    for row in _trained(setting):
        lines.append({"method": row.label, **{task: _change(changed[task].get(row.label)) for task in changed}})
    return pd.DataFrame(lines)


def frontier(setting: Setting) -> list[Point]:
    """Every trained row: what it gained on the setting's task, and what it lost of the retained ones (their mean), or,
    if there are none, of the plain text. Empty if neither was measured or the base is missing."""
    base, changed = _base(setting), changes(setting)
    if base is None or base.scores is None:
        return []
    points = []
    for row in _trained(setting):
        gain = _gain(setting, row, base)
        if gain is None:
            continue
        lost = [made[row.label] for made in changed.values() if row.label in made]
        if lost:
            loss = -sum(c.difference for c in lost) / len(lost)
            error = math.sqrt(sum(((c.high - c.low) / 2) ** 2 for c in lost)) / len(lost)
            axis = f"loss on {', '.join(changed)}" + (" (mean)" if len(changed) > 1 else "")
        elif not math.isnan(row.costs["forgetting"]):
            loss, error = row.costs["forgetting"], row.forgetting_error
            axis = "forgetting, nats per token of plain text, ± standard error over seeds"
        else:
            continue
        points.append(
            Point(row.method, row.label, axis, loss=loss, loss_error=error, gain=gain[0], gain_error=gain[1])
        )
    return [replace(point, best=not any(_beats(other, point) for other in points)) for point in points]


def _gain(setting: Setting, row: Row, base: Row) -> tuple[float, float] | None:
    """The gain over the base and the half-width of its 95 % interval; None if they were scored on different items."""
    for pair in setting.comparisons:
        if {pair.first, pair.second} == {row.label, base.label} and not math.isnan(pair.difference):
            sign = 1 if pair.first == row.label else -1
            return sign * pair.difference, (pair.high - pair.low) / 2
    return None


def _beats(one: Point, other: Point) -> bool:
    as_good = one.gain >= other.gain and one.loss <= other.loss
    return as_good and (one.gain > other.gain or one.loss < other.loss)


def _base(setting: Setting) -> Row | None:
    return next((row for row in setting.done if row.costs["trainable"] == 0), None)


def _trained(setting: Setting) -> list[Row]:
    return [row for row in setting.done if row.costs["trainable"] > 0]


def _change(comparison: Comparison | None) -> str:
    if comparison is None:
        return "–"
    p = "p < 0.001" if comparison.p_holm < 0.001 else f"p = {comparison.p_holm:.3f}"
    text = f"{comparison.difference:+.3f}".replace("-", "−")
    return f"tie ({text}, {p})" if comparison.tie else f"{text} ({p})"
