"""The report of a comparison: a Markdown table, a CSV file and a figure."""

import textwrap
from itertools import cycle
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from peft_steer.bench.plan import Cell, Grid


_NUMBERS = ("score", "stderr", "n", "trainable", "parameters", "train_seconds")
_BYTES = ("peak_bytes", "saved_bytes", "adapter_bytes")


def write_report(grid: Grid, cells: list[Cell], results: list[dict[str, Any]], directory: Path) -> str:
    """Writes `table.md`, `results.csv` and `figure.png` into `directory`.

    Returns:
        The Markdown.
    """
    directory.mkdir(parents=True, exist_ok=True)
    frame = _frame(cells, results)
    frame.to_csv(directory / "results.csv", index=False)
    head = f"{cells[0].model}, {cells[0].dtype}; `{cells[0].task}`, {grid.split} split."
    environment = next((result["environment"] for result in results if "environment" in result), {})
    failures = [f"- {row.method}: {row.error}" for row in frame.itertuples() if row.error]
    markdown = (
        "\n\n".join([head, _table(frame), *failures, ", ".join(f"{k} {v}" for k, v in environment.items())]) + "\n"
    )
    (directory / "table.md").write_text(markdown)
    _figure(frame, head).savefig(directory / "figure.png", dpi=150)
    return markdown


def _frame(cells: list[Cell], results: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a cell. Numbers that a cell does not have are NaN; its error is "" if it has none."""
    rows = [
        {
            "method": cell.name,
            "learning_rate": cell.learning_rate or float("nan"),
            "seed": cell.seed,
            "metric": result.get("metric", ""),
            # lm-eval's standard error is "N/A" where it has none
            **{c: result.get(c) if isinstance(result.get(c), (int, float)) else None for c in (*_NUMBERS, *_BYTES)},
            "error": result.get("error", ""),
            "key": cell.key,
        }
        for cell, result in zip(cells, results, strict=True)
    ]
    return pd.DataFrame(rows).astype(dict.fromkeys((*_NUMBERS, *_BYTES), float))


def _table(frame: pd.DataFrame) -> str:
    def text(template: str, value: float) -> str:
        return "–" if pd.isna(value) else template.format(value)

    several_seeds = frame["seed"].nunique() > 1
    rows = [
        {
            "method": row.method,
            "learning rate": text("{:g}", row.learning_rate),
            **({"seed": row.seed} if several_seeds else {}),
            "trainable": text("{:,.0f}", row.trainable),
            "share": text("{:.3f} %", 100 * row.trainable / row.parameters),
            "accuracy ± s.e.": "failed" if row.error else f"{row.score:.3f} ± {row.stderr:.3f}",
            "n": text("{:.0f}", row.n),
            "training": text("{:.0f} s", row.train_seconds),
            "peak memory": text("{:,.0f} MB", row.peak_bytes / 1e6),
            "saved for backward": text("{:,.1f} MB", row.saved_bytes / 1e6),
            "file": text("{:,.0f} kB", row.adapter_bytes / 1e3),
        }
        for row in frame.itertuples()
    ]
    table = pd.DataFrame(rows)
    align = ["left" if column in ("method", "accuracy ± s.e.") else "right" for column in table.columns]
    return table.to_markdown(index=False, disable_numparse=True, colalign=align)


def _figure(frame: pd.DataFrame, title: str) -> Figure:
    """Accuracy against trainable parameters, with standard errors; the untrained base is the dashed line."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    done = frame[frame["score"].notna()].sort_values("score", ascending=False)
    for row, marker in zip(done.itertuples(), cycle("osD^vPX<>*hpd")):
        rate = "" if pd.isna(row.learning_rate) else f", {row.learning_rate:g}"
        label = f"{row.method}{rate} ({row.score:.3f})"
        if row.trainable == 0:
            axes.axhline(row.score, color="0.4", linestyle="--", label=label)
            axes.axhspan(row.score - row.stderr, row.score + row.stderr, color="0.4", alpha=0.15, linewidth=0)
        else:
            axes.errorbar(row.trainable, row.score, yerr=row.stderr, fmt=marker, markersize=8, capsize=4, label=label)
    if (done["trainable"] > 0).any():
        axes.set_xscale("log")
    axes.set_xlabel("trainable parameters")
    axes.set_ylabel("accuracy ± standard error")
    axes.set_title(textwrap.fill(title, 90), fontsize="small")
    axes.grid(alpha=0.3)
    if len(done):
        figure.legend(loc="outside right upper", frameon=False)
    return figure
