"""The report of a comparison: Markdown, CSV, a figure, and an HTML page that needs no connection."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..grid.plan import Cell, Grid
from .frame import cell_frame, settings
from .html import page
from .markdown import markdown
from .over_steps import pictures
from .picture import picture


def write_report(
    grid: Grid, cells: Sequence[Cell], results: Sequence[dict[str, Any]], directory: Path, remarks: Sequence[str] = ()
) -> str:
    """Writes `table.md`, `figure.png`, `report.html`, `results.csv` (a row a cell) and `comparisons.csv` (a row a
    pair).

    Args:
        grid: Printed at the end of the page.
        cells, results: In the same order.
        directory: For the files; made if it is not there.
        remarks: Lines about the choices that were made.

    Returns:
        The Markdown.
    """
    directory.mkdir(parents=True, exist_ok=True)
    frame = cell_frame(cells, results)
    frame.to_csv(directory / "results.csv", index=False)
    compared = settings(cells, results)
    pairs = [
        {"model": setting.model, "precision": setting.precision, "task": setting.task, "split": setting.split, **line}
        for setting in compared
        for line in (vars(pair) | {"tie": pair.tie, "detectable": pair.detectable} for pair in setting.comparisons)
    ]
    if pairs:
        pd.DataFrame(pairs).to_csv(directory / "comparisons.csv", index=False)
    text = markdown(compared, frame, list(remarks), grid.reference)
    (directory / "table.md").write_text(text, encoding="utf-8")
    picture(compared).savefig(directory / "figure.png", dpi=150)
    for name, figure in pictures(compared).items():
        figure.savefig(directory / f"{name}.png", dpi=150)
    (directory / "report.html").write_text(page(grid, compared, frame, list(remarks)), encoding="utf-8")
    return text
