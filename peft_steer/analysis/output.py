"""Results on disk: tables as CSV and JSON, figures as PNG and SVG, each complete or not there."""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure


_FACTS = ("base", "tuned", "dtype", "load_in_4bit", "load_in_8bit", "num_texts", "seed")


def facts_of(args: argparse.Namespace) -> dict[str, Any]:
    """What an analysis of a pair was asked to measure, and on what."""
    return {name: getattr(args, name) for name in _FACTS} | {"text": args.task or args.dataset}


def write_table(directory: Path, name: str, frame: pd.DataFrame, **facts: Any) -> None:
    """Writes `name.csv`, and `name.json` with `facts` (what was measured, on what) beside the `rows`."""
    rows = json.loads(frame.to_json(orient="records", double_precision=15))
    write(directory / f"{name}.csv", lambda path: frame.to_csv(path, index=False))
    write(directory / f"{name}.json", lambda path: path.write_text(json.dumps({**facts, "rows": rows}, indent=1)))


def write_figure(directory: Path, name: str, figure: Figure) -> None:
    """Writes `name.png` and `name.svg`."""
    for suffix in ("png", "svg"):
        write(directory / f"{name}.{suffix}", lambda path: figure.savefig(path, dpi=150))


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Makes the file `path` by `save(another path of the same suffix)`, so that it is never seen half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        partial = Path(folder) / path.name
        save(partial)
        os.replace(partial, path)
