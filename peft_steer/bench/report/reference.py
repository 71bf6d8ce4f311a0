"""Published scores beside ours."""

import math
from collections.abc import Sequence

import pandas as pd

from ..grid.plan import Reference
from .frame import Row, Setting


_QUANTILE = 1.96  # of the normal distribution, 95 %


def reference_table(setting: Setting, reference: Sequence[Reference]) -> pd.DataFrame:
    """A line for each published score of the setting's task and model, and each of our rows of its method."""
    lines = []
    for entry in reference:
        if entry.task != setting.task or (entry.model is not None and not _is(setting.model, entry.model)):
            continue
        rows = [row for row in setting.rows if row.method == entry.method]
        lines += [_line(entry, row) for row in rows] or [_line(entry, None)]
    return pd.DataFrame(lines)


def _is(shown: str, named: str) -> bool:
    """Whether the model that a setting shows is the named one: its label may say where the weights are from."""
    return shown == named or shown.startswith(f"{named} (")


def _line(entry: Reference, row: Row | None) -> dict[str, str]:
    line = {"method": entry.method if row is None else row.label, "published": f"{entry.score:.3f}"}
    if row is None or row.summary is None:
        return {**line, "ours": "–", "difference": "–", "source": entry.source}
    ours = row.summary
    gap = f"{ours.mean - entry.score:+.3f}".replace("-", "−")
    gap += " (within the noise)" if within_noise(ours.mean, ours.stderr, entry) else ""
    return {**line, "ours": f"{ours.mean:.3f} ± {ours.stderr:.3f}", "difference": gap, "source": entry.source}


def within_noise(mean: float, stderr: float, entry: Reference) -> bool:
    """Whether our mean differs from the published one by less than 1.96 standard errors of the difference.

    The published score is taken for a mean over `entry.n` items that are right or wrong, or for exact if `n` is not
    known. The items may be the same as ours, so the two errors are not independent: this is on the side of "within".
    """
    theirs = entry.score * (1 - entry.score) / entry.n if entry.n else 0.0
    return abs(mean - entry.score) <= _QUANTILE * math.sqrt(stderr**2 + theirs)
