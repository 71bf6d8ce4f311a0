"""The report as Markdown: the contenders of every model and task, the sweep that chose their rates, what failed."""

import math
import statistics
from collections.abc import Iterator, Sequence

import pandas as pd

from ..grid.plan import Reference
from .frame import Setting
from .reference import reference_table
from .retention import changes, retention_table
from .table import main_table, sweep_table


TEXT_COLUMNS = ("method", "trainer", "against the best", "ties", "variant", "source")


def markdown(
    settings: list[Setting], frame: pd.DataFrame, remarks: list[str], reference: Sequence[Reference] = ()
) -> str:
    """The whole report."""
    parts = []
    for setting in settings:
        parts.append(f"## {setting.title}" if len(settings) > 1 else f"{setting.title}.")
        parts += [_main(setting), *notes(setting)]
        for title, table, note in beside(setting, reference):
            parts += [f"{title}:", aligned(table), note]
        if setting.split == "test" and len(setting.sweep):
            parts += [f"Chosen on the validation split ({setting.metric}):", aligned(sweep_table(setting))]
    if lines := failures(frame):
        parts += ["Failed:", "\n".join(f"- {line}" for line in lines)]
    if remarks:
        parts.append("\n".join(f"- {remark}" for remark in remarks))
    return "\n\n".join([*parts, *environments(frame)]) + "\n"


def notes(setting: Setting) -> list[str]:
    """What the numbers of a setting's table are, in whole sentences."""
    if not setting.done:
        return []
    several = [row for row in setting.done if row.n_seeds > 1]
    alone = [row.label for row in setting.done if row.n_seeds == 1 and row.losses]
    over = "test items (Wilson's)"
    if several:
        over = "test items and training seeds (Student's t; for a single training over test items alone, Wilson's)"
    text = [f"The standard error and the 95 % interval are over {over}."]
    if setting.split == "validation":
        text = ["These are validation scores: a rate chosen by them has no result yet.", *text]
    if tested := [c.test for c in setting.comparisons if not math.isnan(c.p)]:
        what = f"each of the {len(tested)} pairs is" if len(tested) > 1 else "the pair is"
        text.append(
            f"Methods are compared on the same items: {what} tested ({' or '.join(sorted(set(tested)))}), p after "
            "Holm's correction. Methods that share a letter are a tie."
        )
        seen = statistics.median(c.detectable for c in setting.comparisons if not math.isnan(c.p))
        text.append(f"Half of the pairs would have shown a true difference of {seen:.3f} four times in five.")
    if alone and several:
        text.append(f"Of {', '.join(alone)} one training alone is known: the luck of its seed is not counted.")
    elif alone:
        text.append("All this holds for these trainings: with one seed it is not known how much others would differ.")
    return [" ".join(text), *(c.test for c in setting.comparisons if math.isnan(c.p))]


def beside(setting: Setting, reference: Sequence[Reference]) -> Iterator[tuple[str, pd.DataFrame, str]]:
    """The setting's other tables, where there is something for them: title, table, and what its numbers are."""
    if changes(setting):
        note = (
            "Each is the change from the untrained base on the same items, with p after Holm's correction over the "
            "rows of a task; what is inside the noise is called a tie."
        )
        yield "What is kept of other tasks", retention_table(setting), note
    if len(table := reference_table(setting, reference)):
        note = (
            "Within the noise: the difference is below 1.96 standard errors of ours and, where its number of items is "
            "known, of the published one."
        )
        yield "Published, and ours", table, note


def failures(frame: pd.DataFrame) -> list[str]:
    """A line for every cell that failed."""
    several = len(frame[["model", "task"]].drop_duplicates()) > 1
    lines = []
    for row in frame[frame["status"] == "failed"].itertuples():
        where = f"{row.model}, {row.task}, {row.method}" if several else row.method
        rate = "" if pd.isna(row.learning_rate) else f"learning rate {row.learning_rate:g}, "
        lines.append(f"{where}: {row.error} ({rate}seed {row.seed}, {row.split})")
    return lines


def environments(frame: pd.DataFrame) -> list[str]:
    """A line for every set of versions and devices that cells ran with."""
    if "device" not in frame:
        return []
    names = list(frame.columns[frame.columns.get_loc("device") : frame.columns.get_loc("key")])
    known = frame[frame["device"].notna()][names].drop_duplicates()
    return [", ".join(f"{name} {value}" for name, value in line.items()) for line in known.to_dict("records")]


def _main(setting: Setting) -> str:
    table = main_table(setting)
    return aligned(table.map(lambda entry: entry[0]))


def aligned(table: pd.DataFrame) -> str:
    escaped = table.map(lambda text: text.replace("|", r"\|"))
    align = ["left" if name in TEXT_COLUMNS or "±" in name or "rate:" in name else "right" for name in table.columns]
    return escaped.to_markdown(index=False, disable_numparse=True, colalign=align)
