"""Cells on this machine, in worker processes that keep the base model loaded. A crash ends one worker only."""

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from peft_steer.utils.devices import visibility_variable, visible_accelerators
from peft_steer.utils.errors import UsageError

from ..grid.plan import Cell
from ..run.multiprocess import shared_batch
from ..run.worker import Worker
from ..store import Store


class LocalEngine:
    """Runs `jobs` cells at a time.

    GPUs are divided among the workers: with two jobs on four GPUs each cell sees two at most, and with more jobs than
    GPUs they share them. A cell sees as many as its `gpus` says, one at least.
    """

    def __init__(self, jobs: int = 1):
        self._gpus = visible_accelerators()
        self._slots = [_Slot(devices, jobs) for devices in _shares(self._gpus, jobs)]

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(self, *_: object) -> None:
        for slot in self._slots:
            slot.stop()

    def check(self, cells: list[Cell]) -> None:
        """Raises a `UsageError` if one of the cells needs more GPUs than a worker has."""
        have = len(self._slots[0].devices)
        for cell in cells:
            need = math.ceil(cell.gpus)
            if cell.processes > 1:
                shared_batch(cell)
                need = max(need, cell.processes if have else 0)
            if need > have:
                remedies = {True: "use --engine ray", not have: "`gpus: 0` runs it on the CPU"}
                remedies[need <= len(self._gpus)] = "use fewer --jobs"
                raise UsageError(
                    f"{cell.name}: needs {need} GPUs, and each of {len(self._slots)} jobs has {have}; {remedies[True]}"
                )

    def has_room(self, cell: Cell) -> bool:
        """Whether a worker is idle."""
        return any(slot.cell is None for slot in self._slots)

    def start(self, cell: Cell, store: Store) -> None:
        """Begins a cell on an idle worker, if there is one on one that has its model loaded."""
        idle = [slot for slot in self._slots if slot.cell is None]
        min(idle, key=lambda slot: slot.model != _model(cell)).start(cell, store)

    def finished(self, timeout: float) -> Iterator[tuple[Cell, dict[str, Any]]]:
        """The cells that ended, with their results. The end of a worker is the failure of its cell."""
        busy = [slot for slot in self._slots if slot.cell is not None]
        if not busy:
            time.sleep(timeout)
        wait([end for slot in busy for end in (slot.connection, slot.process.sentinel)], timeout)
        for slot in busy:
            if slot.connection.poll() or not slot.process.is_alive():
                yield slot.take()


class _Slot:
    """A place for a worker, and the worker if there is one."""

    def __init__(self, devices: list[str], jobs: int):
        self.devices, self.jobs = devices, jobs
        self.cell: Cell | None = None
        self.model: Any = None
        self.process: Any = None
        self.connection: Any = None
        self._visible: list[str] = []

    def start(self, cell: Cell, store: Store) -> None:
        visible = self.devices[: max(1, math.ceil(cell.gpus), cell.processes)]
        if self.process is None or not self.process.is_alive() or visible != self._visible:
            self.stop()
            self._visible = visible
            self._start_worker()
        self.cell, self.model = cell, _model(cell)
        self.connection.send((cell, store.adapter_path(cell), store.log_path(cell) if self.jobs > 1 else None))

    def take(self) -> tuple[Cell, dict[str, Any]]:
        cell, self.cell = self.cell, None
        assert cell is not None
        try:
            if not self.connection.poll():  # a process that it started still has the other end open
                raise EOFError
            result = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            error = f"its process died with exit code {code} (-9 often means out of memory)"
            result = {"status": "failed", "error": error}
        if result["status"] == "failed":
            self.stop()  # the error may have left it in any state
        return cell, result

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
        self.process = self.connection = self.cell = self.model = None

    def _start_worker(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["peft_steer.bench.run.cell"])  # the slow imports, once
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, self._visible, self.jobs))
        self.process.start()
        theirs.close()


def _work(connection: Connection, gpus: list[str], jobs: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends this process
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if gpus:
        os.environ[visibility_variable()] = ",".join(gpus)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    worker = Worker()
    while True:
        try:
            cell, adapter_dir, log = connection.recv()
        except EOFError:
            return
        if log is not None:
            _print_to(log)
        connection.send(worker.run(cell, adapter_dir))


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _print_to(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _model(cell: Cell) -> tuple[str, str, str]:
    """What the base model of a cell is known by."""
    return cell.source, cell.dtype, repr(cell.quantization)


def _shares(gpus: list[str], jobs: int) -> list[list[str]]:
    """The GPUs of each job."""
    each = len(gpus) // jobs
    if each:
        return [gpus[i * each : (i + 1) * each] for i in range(jobs)]
    return [gpus[i % len(gpus) :][:1] if gpus else [] for i in range(jobs)]
