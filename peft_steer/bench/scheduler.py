"""Runs the cells that have no result yet on an engine's workers, and writes what they return.

A cell is locked while it runs, and its result is written before the lock is released. So several runners can share a
directory, and a killed one loses only the cells that it was running.
"""

import logging
from typing import Any

from filelock import FileLock

from peft_steer.bench.engines.base import Engine
from peft_steer.bench.grid.plan import Cell
from peft_steer.bench.store import Store


logger = logging.getLogger(__name__)
_POLL = 1.0  # seconds between two looks at cells that another runner has


def run_cells(cells: list[Cell], store: Store, engine: Engine) -> list[dict[str, Any]]:
    """Runs every cell without a finished result. A failed one is recorded, and tried again by the next run.

    Args:
        cells: What to run; the first are started first.
        store: Where results are kept.
        engine: An entered engine, as `make_engine` makes them.

    Returns:
        One result a cell, in their order: `status` is "done", with what was measured, or "failed", with `error`.

    Raises:
        UsageError: If a cell cannot be run by this engine, or a result cannot be read; before anything is run.
    """
    engine.check(cells)
    run = _Run(cells, store, engine)
    run.go()
    return [run.results[cell.key] for cell in cells]


class _Run:
    def __init__(self, cells: list[Cell], store: Store, engine: Engine):
        self.store, self.engine = store, engine
        self.waiting = list({cell.key: cell for cell in cells}.values())
        self.total = len(self.waiting)
        self.results: dict[str, dict[str, Any]] = {}
        self.locks: dict[str, FileLock] = {}  # of the cells that run here
        self.stamps: dict[str, int | None] = {}  # of failures before this run, which are tried again
        for cell in list(self.waiting):
            self.stamps[cell.key] = store.stamp(cell)
            result = store.read(cell)
            if result is not None and result["status"] == "done":
                self._take(cell, result, "finished before: ")

    def go(self) -> None:
        told = False
        try:
            while self.waiting or self.locks:
                elsewhere = self._start_what_fits()
                if elsewhere and not self.locks and not told:
                    folder = self.store.directory / "locks"
                    print(f"{elsewhere} cells are run by another runner (which holds {folder}): waiting", flush=True)
                    told = True
                if self.waiting or self.locks:
                    for cell, result in self.engine.finished(_POLL):
                        self.store.write(cell, result)
                        self._take(cell, result)
                        self.locks.pop(cell.key).release()
        finally:
            for lock in self.locks.values():
                lock.release()

    def _start_what_fits(self) -> int:
        """Returns how many of the waiting cells others are running."""
        full, elsewhere = set(), 0
        for cell in list(self.waiting):
            resources = (cell.gpus, cell.processes)
            if resources in full:
                continue
            if not self.engine.has_room(cell):
                full.add(resources)
                continue
            lock = self.store.lock(cell)
            if lock is None:
                elsewhere += 1
            elif self.store.stamp(cell) != self.stamps[cell.key] and (result := self.store.read(cell)) is not None:
                self._take(cell, result, "another runner: ")
                lock.release()
            else:
                self.waiting.remove(cell)
                self.locks[cell.key] = lock
                self._say(cell, "")
                self.engine.start(cell, self.store)
        return elsewhere

    def _take(self, cell: Cell, result: dict[str, Any], how: str = "") -> None:
        self.results[cell.key] = result
        if cell in self.waiting:
            self.waiting.remove(cell)
        outcome = f"{result['metric']} {result['score']:.3f}" if result["status"] == "done" else result["error"]
        self._say(cell, f": {how}{outcome}")

    def _say(self, cell: Cell, text: str) -> None:
        number = len(self.results) + (0 if text else len(self.locks))
        trained = f", learning rate {cell.learning_rate:g}, seed {cell.seed}" if cell.config else ""
        print(f"[{number}/{self.total}] {cell.task}, {cell.split}: {cell.name}{trained}{text}", flush=True)
