"""Results on disk: tables as CSV and JSON, figures as PNG and SVG, each complete or not there."""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout
from matplotlib.figure import Figure


_NOT_MEASURED = ("output", "layers_to_transform")  # where, and how much of it in this run


def facts_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a command was asked to measure, and on what: its flags, and which files they named, so that a run that goes
    on where another stopped sees that a model has been replaced."""
    flags = {name: value for name, value in vars(args).items() if name not in _NOT_MEASURED}
    paths = [value for name in ("base", "tuned", "adapter", "dataset") if (value := flags.get(name)) is not None]
    return json.loads(json.dumps(flags | {"files": [file for path in paths for file in _files(Path(path))]}))


def check_same_run(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises `ValueError`, naming what differs, unless the file `path` was left by a run with the same facts."""
    differ = [
        f"{name} {before.get(name)!r} instead of {now.get(name)!r}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if differ:
        raise ValueError(
            f"--output: {path} is of a run with {', '.join(differ)}; choose another directory, or delete it"
        )


@contextmanager
def only_run(directory: Path) -> Iterator[None]:
    """Keeps other runs out of a directory. Raises `ValueError` if one is at work there."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = directory / ".lock"
    try:
        with FileLock(lock, blocking=False):
            yield
            lock.unlink()  # an adapter's directory may be uploaded as it is
    except Timeout as error:
        raise ValueError(
            f"--output: another run is at work in {str(directory)!r}; choose another directory"
        ) from error


def _files(path: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a local model's weights, or of a file."""
    found = [path] if path.is_file() else sorted(path.glob("*.safetensors")) + sorted(path.glob("*.bin"))
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in found]


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
