"""Results on disk: tables as CSV and JSON, figures as PNG and SVG, each written atomically."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from peft_steer.utils.errors import UsageError
from peft_steer.utils.files import atomic_path, try_lock, write_json


_NOT_MEASURED = ("output", "layers_to_transform")  # where the results go, and how much of them this run makes


def facts_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a command measures, for its results: its flags, and the sizes and times of the files that they name, so
    that a resumed run notices a model that has been replaced."""
    flags = {name: value for name, value in vars(args).items() if name not in _NOT_MEASURED}
    paths = [value for name in ("base", "tuned", "adapter", "dataset") if (value := flags.get(name)) is not None]
    return json.loads(json.dumps(flags | {"files": [file for path in paths for file in _files(Path(path))]}))


def check_same_run(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises `UsageError`, naming the differences, unless the results in `path` have the facts of this run."""
    differ = [
        f"{name} {before.get(name)!r} instead of {now.get(name)!r}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if differ:
        raise UsageError(
            f"--output: {path} is from a run with {', '.join(differ)}; choose another directory, or delete it"
        )


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Locks a directory against other runs while the context lasts.

    Raises:
        UsageError: If another run holds the lock.
    """
    path = folder / ".lock"
    lock = try_lock(path)
    if lock is None:
        raise UsageError(f"--output: another run is at work in {str(folder)!r}; choose another directory")
    try:
        yield
        path.unlink()  # a finished adapter's directory may be uploaded as it is
    finally:
        lock.release()


def _files(path: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a local model's weights, or of a file."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) + sorted(path.glob("*.bin"))
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def write_table(folder: Path, name: str, frame: pd.DataFrame, **facts: Any) -> None:
    """Writes `name.csv`, and `name.json` with `facts` (what was measured, on what) beside the `rows`."""
    with atomic_path(folder / f"{name}.csv") as partial:
        frame.to_csv(partial, index=False)
    rows = json.loads(frame.to_json(orient="records", double_precision=15))
    write_json(folder / f"{name}.json", {**facts, "rows": rows})


def write_figure(folder: Path, name: str, figure: Figure) -> None:
    """Writes `name.png` and `name.svg`."""
    for suffix in ("png", "svg"):
        with atomic_path(folder / f"{name}.{suffix}") as partial:
            figure.savefig(partial, dpi=150)
