"""Runs the cells that have no result yet, each in its own process, and reads the results.

A result is one JSON file, named by the cell's key and written in one step: whoever kills the run at whatever moment,
each cell is either finished or not, and the next run does what is left.
"""

import json
import multiprocessing
import os
import tempfile
import threading
import traceback
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from peft_steer.bench.plan import Cell


def result_path(directory: Path, cell: Cell) -> Path:
    """The file of a cell's result."""
    return directory / "cells" / f"{cell.key}.json"


def adapter_path(directory: Path, cell: Cell) -> Path:
    """The folder of a cell's trained adapter."""
    return directory / "adapters" / cell.key


def read_result(directory: Path, cell: Cell) -> dict[str, Any] | None:
    """A cell's result, or None if it has not run.

    Raises:
        ValueError: If the file is not what `run_cells` writes.
    """
    path = result_path(directory, cell)
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text())
        if result["status"] not in ("done", "failed"):
            raise ValueError(f"status {result['status']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of this bench ({error}); remove it to run the cell again") from error
    return result


def run_cells(cells: list[Cell], model_path: str, directory: Path) -> list[dict[str, Any]]:
    """Runs every cell without a finished result, in turn. A failed one is recorded, and tried again by the next run.

    A process of its own makes a cell's peak memory its own, and confines a crash to its row.

    Returns:
        One result per cell: `status` is "done", with what `run_cell` returned, or "failed", with `error`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peft_steer.bench.cell"])  # the slow imports, once
    results = []
    for number, cell in enumerate(cells, start=1):
        result = read_result(directory, cell)
        title = f"[{number}/{len(cells)}] {cell.name}, learning rate {cell.learning_rate:g}, seed {cell.seed}"
        if result is not None and result["status"] == "done":
            print(f"{title}: finished before", flush=True)
        else:
            print(title, flush=True)
            result = _run(context, cell, model_path, directory)
            outcome = f"{result['metric']} {result['score']:.3f}" if result["status"] == "done" else result["error"]
            print(f"{title}: {outcome}", flush=True)
        results.append(result)
    return results


def _run(context: Any, cell: Cell, model_path: str, directory: Path) -> dict[str, Any]:
    result_path(directory, cell).unlink(missing_ok=True)
    process = context.Process(target=_work, args=(cell, model_path, directory), name=cell.name)
    process.start()
    try:
        process.join()
    finally:
        process.kill()
    result = read_result(directory, cell)
    if result is None:
        error = f"its process ended with exit code {process.exitcode}, without a word (-9 is often: out of memory)"
        result = {"status": "failed", "error": error}
        _write(directory, cell, result)
    return result


def _work(cell: Cell, model_path: str, directory: Path) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    from peft_steer.bench.cell import run_cell

    try:
        result = {"status": "done", **run_cell(cell, model_path, adapter_path(directory, cell))}
    except Exception as error:  # whatever it is, it belongs into this cell's row
        traceback.print_exc()
        result = {"status": "failed", "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    _write(directory, cell, result)


def _exit_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _write(directory: Path, cell: Cell, result: dict[str, Any]) -> None:
    path = result_path(directory, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial", delete=False) as file:
        json.dump({"cell": vars(cell), **result}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)
