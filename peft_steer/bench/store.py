"""The results directory of a comparison, which several runners may share.

    bench.json                  the version of this format
    cells/<key>.json            the result of a cell
    adapters/<training_key>/    a trained adapter with `training.json`, what its training cost
    locks/<training_key>.lock   held while a cell is run; the operating system releases it when its holder dies

Writes are atomic: a file is complete or absent, even after a kill.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock

from peft_steer.utils.errors import UsageError
from peft_steer.utils.files import atomic_path, remove_partial, try_lock, write_json

from .grid.plan import VERSION, Cell


_TRAINING = "training.json"


class Store:
    """A results directory, made if it is missing.

    Args:
        directory: The folder. Other files in it are left alone.

    Raises:
        UsageError: If another version of this library wrote the directory, or if one of its results cannot be read.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._check_version()
        for folder in ("cells", "adapters", "locks"):
            (self.directory / folder).mkdir(parents=True, exist_ok=True)
        for path in sorted((self.directory / "cells").glob("*.json")):
            _read_result(path)

    def result_path(self, cell: Cell) -> Path:
        """The file of a cell's result."""
        return self.directory / "cells" / f"{cell.key}.json"

    def adapter_path(self, cell: Cell) -> Path:
        """The folder of a cell's trained adapter, which cells that differ in their evaluation only have in common."""
        return self.directory / "adapters" / cell.training_key

    def log_path(self, cell: Cell) -> Path:
        """What a cell printed, where several run at once."""
        return self.directory / "logs" / f"{cell.key}.log"

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """A cell's result, or None if it has none.

        Raises:
            UsageError: If the file is not what `write` writes.
        """
        path = self.result_path(cell)
        return _read_result(path) if path.is_file() else None

    def stamp(self, cell: Cell) -> int | None:
        """Changes whenever a result is written; None where there is none."""
        path = self.result_path(cell)
        return path.stat().st_mtime_ns if path.is_file() else None

    def write(self, cell: Cell, result: dict[str, Any]) -> None:
        """Writes a cell's result, `status` ("done" or "failed") and what was measured, over any earlier one."""
        write_json(self.result_path(cell), {"cell": asdict(cell), **result})

    def lock(self, cell: Cell) -> FileLock | None:
        """The cell's lock, acquired, or None while somebody else has it. It covers the cell's adapter too.

        What a killed holder left unfinished is removed.
        """
        lock = try_lock(self.directory / "locks" / f"{cell.training_key}.lock")
        if lock is not None:
            remove_partial(self.result_path(cell))
            remove_partial(self.adapter_path(cell))
        return lock

    def _check_version(self) -> None:
        path = self.directory / "bench.json"
        if path.is_file():
            try:
                version = json.loads(path.read_text())["version"]
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(f"{path} is not what peft-steer bench writes ({error}); {_REMEDY}") from error
        elif any((self.directory / "cells").glob("*.json")):
            version = 1  # which had no such file
        else:
            write_json(path, {"version": VERSION})
            return
        if version != VERSION:
            raise UsageError(
                f"{self.directory} has results of version {version} of the benchmark's format, this is version "
                f"{VERSION}: cells mean something else, and would be mixed up; {_REMEDY}"
            )


_REMEDY = "name another directory with --output, or remove this one"


def save_training(path: Path, save: Any, costs: dict[str, Any]) -> None:
    """Puts a trained adapter into the folder `path`, with what its training cost, in one step.

    Args:
        path: `Store.adapter_path`.
        save: Called with a folder to save the adapter to: `model.save_pretrained`.
        costs: What `read_training` is to return.
    """
    with atomic_path(path) as folder:
        folder.mkdir()
        save(folder)
        (folder / _TRAINING).write_text(json.dumps(costs))


def read_training(path: Path) -> dict[str, Any] | None:
    """What the training of the adapter in the folder `path` cost, or None if it has not been trained.

    Raises:
        UsageError: If the folder is not what `save_training` writes.
    """
    if not path.exists():
        return None
    try:
        return json.loads((path / _TRAINING).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} is not a trained adapter of this bench ({error}); remove it to train again"
        ) from error


def _read_result(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text())
        if result["status"] not in ("done", "failed"):
            raise ValueError(f"status {result['status']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a result of this bench ({error}); remove it to run the cell again") from error
    return result
