"""The report of a comparison: a Markdown table, a CSV file and a figure."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from peft_steer.bench.plan import Cell, Grid


_NONE = "–"


def write_report(grid: Grid, cells: list[Cell], results: list[dict[str, Any]], directory: Path) -> str:
    """Writes `table.md`, `results.csv` and `figure.png` into `directory`.

    Returns:
        The Markdown.
    """
    directory.mkdir(parents=True, exist_ok=True)
    frame = _frame(cells, results)
    frame.to_csv(directory / "results.csv", index=False)
    markdown = f"{_headline(cells, results, grid)}\n\n{_table(frame)}\n"
    (directory / "table.md").write_text(markdown)
    _figure(frame, grid).savefig(directory / "figure.png", dpi=150)
    return markdown


def _frame(cells: list[Cell], results: list[dict[str, Any]]) -> pd.DataFrame:
    columns = [
        "metric",
        "score",
        "stderr",
        "n",
        "trainable",
        "parameters",
        "train_seconds",
        "peak_bytes",
        "saved_bytes",
    ]
    columns += ["adapter_bytes", "error"]
    rows = [
        {
            "method": cell.name,
            "learning_rate": cell.learning_rate or None,
            "seed": cell.seed,
            **{column: result.get(column) for column in columns},
            "key": cell.key,
        }
        for cell, result in zip(cells, results, strict=True)
    ]
    return pd.DataFrame(rows).astype({column: float for column in columns if column not in ("metric", "error")})


def _headline(cells: list[Cell], results: list[dict[str, Any]], grid: Grid) -> str:
    environment = next((result["environment"] for result in results if "environment" in result), {})
    where = ", ".join([environment.pop("device", "no finished run"), *(f"{k} {v}" for k, v in environment.items())])
    return f"{cells[0].model}, {grid.dtype}; `{grid.task}`, {grid.split} split. {where}."


def _table(frame: pd.DataFrame) -> str:
    def cell(template: str, value: float, divisor: float = 1) -> str:
        return _NONE if pd.isna(value) else template.format(value / divisor)

    several = frame["seed"].nunique() > 1
    rows = [
        {
            "method": row.method,
            "learning rate": cell("{:g}", row.learning_rate),
            **({"seed": row.seed} if several else {}),
            "trainable": cell("{:,.0f}", row.trainable),
            "share": cell("{:.3f} %", row.trainable / row.parameters, 0.01),
            "accuracy ± s.e.": f"failed: {row.error}" if row.error else f"{row.score:.3f} ± {row.stderr:.3f}",
            "n": cell("{:.0f}", row.n),
            "training": cell("{:.0f} s", row.train_seconds),
            "peak memory": cell("{:,.0f} MB", row.peak_bytes, 1e6),
            "saved for backward": cell("{:,.1f} MB", row.saved_bytes, 1e6),
            "file": cell("{:,.0f} kB", row.adapter_bytes, 1e3),
        }
        for row in frame.itertuples()
    ]
    table = pd.DataFrame(rows)
    right = {"method": "left", "accuracy ± s.e.": "left"}
    return table.to_markdown(
        index=False, disable_numparse=True, colalign=[right.get(c, "right") for c in table.columns]
    )


def _figure(frame: pd.DataFrame, grid: Grid) -> Figure:
    """Accuracy against trainable parameters, with standard errors; the untrained base is the dashed line."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    done = frame[frame["score"].notna()]
    for row in done[done["trainable"] == 0].itertuples():
        axes.axhline(row.score, color="0.4", linestyle="--", label=f"{row.method} ({row.score:.3f})")
        axes.axhspan(row.score - row.stderr, row.score + row.stderr, color="0.4", alpha=0.15, linewidth=0)
    trained = done[done["trainable"] > 0].sort_values("score", ascending=False)
    for row, marker in zip(trained.itertuples(), "osD^vPX<>*hpd" * len(trained), strict=False):
        label = f"{row.method} ({row.score:.3f})"
        axes.errorbar(row.trainable, row.score, yerr=row.stderr, fmt=marker, markersize=8, capsize=4, label=label)
    if len(trained):
        axes.set_xscale("log")
    axes.set_xlabel("trainable parameters")
    axes.set_ylabel(f"{grid.task} accuracy ± standard error")
    axes.grid(alpha=0.3)
    if len(done):
        figure.legend(loc="outside right upper", frameon=False)
    return figure
