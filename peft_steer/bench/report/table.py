"""The columns of a comparison's main table, as text and as the numbers to sort by."""

import math
from collections.abc import Callable
from typing import Any

import pandas as pd

from .frame import Row, Setting


Entry = tuple[str, float | str]  # what is shown, and what it is sorted by


def main_table(setting: Setting) -> pd.DataFrame:
    """One line a row of the setting, each entry a `Entry`. A column that would be empty is left out."""
    columns = {"method": _method, "learning rate": _choice, **_NUMBERS}
    table = pd.DataFrame(
        {
            name.replace("score", setting.metric): [entry(row) for row in setting.rows]
            for name, entry in columns.items()
            if name in _ALWAYS or any(entry(row)[0] != _NONE for row in setting.done)
        }
    )
    if {row.trainer for row in setting.rows} - {"", "sft"}:
        table.insert(1, "trainer", [(row.trainer or _NONE, row.trainer) for row in setting.rows])
    best = max(setting.done, key=lambda row: row.mean).label if setting.done else None
    if len(setting.done) > 1:
        place = list(table).index("95 % CI") + 1
        table.insert(place, "against the best", [_against(row, best) for row in setting.rows])
        table.insert(place + 1, "ties", [(row.letters or _NONE, row.letters) for row in setting.rows])
    return table


def sweep_table(setting: Setting) -> pd.DataFrame:
    """Validation scores, `rate: score`, a line for every method and variant; the chosen one is bold."""
    lines = []
    for (method, variant), part in setting.sweep.groupby(["method", "variant"], sort=False):
        entries = [
            f"**{_validation(line)}**" if line.chosen else _validation(line)
            for line in part.sort_values("learning_rate").itertuples()
        ]
        lines.append([method, variant, *entries])
    width = max((len(line) for line in lines), default=2) - 2
    names = ["method", "variant", "rate: score", *[""] * (width - 1)]
    table = pd.DataFrame([line + [""] * (width + 2 - len(line)) for line in lines], columns=names[: width + 2])
    return table if table["variant"].any() else table.drop(columns="variant")


def _validation(line: Any) -> str:
    return f"{line.learning_rate:g}: " + ("failed" if math.isnan(line.score) else f"{line.score:.3f}")


_NONE = "–"
_ALWAYS = ("method", "learning rate", "score ± s.e.")


def _number(template: str, key: str, factor: float = 1.0) -> Callable[[Row], Entry]:
    def entry(row: Row) -> Entry:
        value = row.costs[key] * factor
        return (_NONE, -math.inf) if math.isnan(value) else (template.format(value), value)

    return entry


def _method(row: Row) -> Entry:
    return row.method, row.method.lower()


def _choice(row: Row) -> Entry:
    rate = row.choice.split(",")[0]
    return row.choice or _NONE, float(rate) if rate else -math.inf


def _share(row: Row) -> Entry:
    share = 100 * row.costs["trainable"] / row.costs["parameters"]
    return (_NONE, -math.inf) if math.isnan(share) else (f"{share:.3f} %", share)


def _score(row: Row) -> Entry:
    if row.summary is None:
        return "failed", -math.inf
    stderr = "" if math.isnan(row.summary.stderr) else f" ± {row.summary.stderr:.3f}"
    return f"{row.summary.mean:.3f}{stderr}", row.summary.mean


def _interval(row: Row) -> Entry:
    if row.summary is None or math.isnan(row.summary.low):
        return _NONE, -math.inf
    return f"{row.summary.low:.3f} to {row.summary.high:.3f}", row.summary.low


def _seeds(row: Row) -> Entry:
    done = len(row.scores.values) if row.scores else 0
    return (f"{done}" if done == row.planned else f"{done} of {row.planned}"), done


def _items(row: Row) -> Entry:
    return (str(row.scores.values.shape[1]), row.scores.values.shape[1]) if row.scores else (_NONE, -math.inf)


def _against(row: Row, best: str | None) -> Entry:
    if row.summary is None:
        return _NONE, -math.inf
    if row.label == best:
        return "best", math.inf
    comparison = row.against_best
    if comparison is None or math.isnan(comparison.p):
        return "not compared", -math.inf
    gap = 0.0 - abs(comparison.difference)  # not −0.0
    p = "p < 0.001" if comparison.p_holm < 0.001 else f"p = {comparison.p_holm:.3f}"
    return (f"tie ({gap:+.3f}, {p})" if comparison.tie else f"{gap:+.3f} ({p})").replace("-", "−", 1), gap


_NUMBERS: dict[str, Callable[[Row], Entry]] = {
    "trainable": _number("{:,.0f}", "trainable"),
    "share": _share,
    "score ± s.e.": _score,
    "95 % CI": _interval,
    "n": _items,
    "seeds": _seeds,
    "training": _number("{:,.0f} s", "train_seconds"),
    "tokens/s": _number("{:,.0f}", "tokens_per_second"),
    "peak memory": _number("{:,.0f} MB", "peak_bytes", 1e-6),
    "saved for backward": _number("{:,.1f} MB", "saved_bytes", 1e-6),
    "file": _number("{:,.0f} kB", "adapter_bytes", 1e-3),
    "decoding": _number("{:.2f} x", "decode_ratio"),
    "forgetting": _number("{:+.3f}", "forgetting"),
    "KL to the base": _number("{:.3f}", "kl"),
    "answer": _number("{:.1f} tokens", "length"),
    "rollouts": _number("{:,.0f} tokens/s", "rollout_tokens_per_second"),
    "optimizer": _number("{:,.1f} MB", "optimizer_bytes", 1e-6),
    "optimizer's share": _number("{:.1f} %", "optimizer_share", 100),
}
