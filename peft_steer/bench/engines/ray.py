"""Cells on a Ray cluster: actors that keep the base model loaded, replaced when their node is lost.

The driver writes everything: results come back to it, and so do trained adapters, which are sent along where a later
cell starts from one. Nodes need no directory in common, but each must be able to load the models: hub ids, or paths
that all of them have.
"""

import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from peft_steer.bench.engines.base import EngineError
from peft_steer.utils.files import atomic_path

from ..grid.plan import Cell
from ..run.multiprocess import shared_batch
from ..run.worker import Worker
from ..store import Store


try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError as error:
    raise ImportError("--engine ray needs Ray: pip install 'peft-steer[ray]'") from error

logger = logging.getLogger(__name__)

_ATTEMPTS = 3  # of a cell whose worker is lost, or of starting a worker


class _Remote:
    """The actor: a `Worker` whose adapters come and go as files."""

    def __init__(self):
        self._worker = Worker()

    def ready(self) -> None:
        """Returns when the actor runs."""

    def run(self, cell: Cell, files: dict[str, bytes] | None) -> tuple[dict[str, Any], dict[str, bytes] | None]:
        """The result of a cell, and the files of its adapter if it was trained here."""
        with tempfile.TemporaryDirectory(prefix="peft-steer-") as folder:
            adapter = Path(folder) / cell.training_key
            if files is not None:
                adapter.mkdir()
                _unpack(files, adapter)
            result = self._worker.run(cell, adapter)
            return result, _pack(adapter) if files is None and adapter.is_dir() else None


class _Task(NamedTuple):
    cell: Cell
    store: Store
    attempt: int = 1


class _Actor:
    """An actor of the cluster, and what it does."""

    def __init__(self, resources: tuple[float, int]):
        gpus, processes = self.resources = resources
        self.handle = ray.remote(_Remote).options(num_cpus=processes, num_gpus=gpus).remote()
        self.waiting_for: ray.ObjectRef | None = self.handle.ready.remote()
        self.task: _Task | None = None  # None while it starts, too

    def run(self, task: _Task) -> None:
        path = task.store.adapter_path(task.cell)
        files = _pack(path) if path.is_dir() else None
        self.task, self.waiting_for = task, self.handle.run.remote(task.cell, files)


class RayEngine:
    """Runs `jobs` cells at a time (by default as many as the cluster has room for) on actors that take `gpus` GPUs
    and a CPU a process.

    Args:
        address: The cluster's, as `ray.init` takes it. Without one, `RAY_ADDRESS`; without that, a cluster of its own
            on this machine.
        jobs: At most so many cells at a time. On a cluster that grows on demand, this is what it grows to.
    """

    def __init__(self, address: str | None = None, jobs: int | None = None):
        self.address, self.jobs = address, jobs
        self._actors: list[_Actor] = []
        self._again: list[_Task] = []  # lost with their workers
        self._failed_starts = 0
        self._owned = False

    def __enter__(self) -> "RayEngine":
        if not ray.is_initialized():
            address = self.address or os.environ.get("RAY_ADDRESS") or "local"
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            alone = {"include_dashboard": False} if address == "local" else {}
            try:
                _knock(address)
                ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **alone)
            except OSError as error:
                raise EngineError(f"--address {address}: no Ray cluster answers there ({error})") from error
            self._owned = True
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor.handle)
        self._actors.clear()
        if self._owned:
            ray.shutdown()

    def check(self, cells: list[Cell]) -> None:
        """Raises a `ValueError` if a cell's batch cannot be divided among its processes."""
        for cell in cells:
            if cell.processes > 1:
                shared_batch(cell)

    def has_room(self, cell: Cell) -> bool:
        """Whether an idle actor has the cell's resources. If not, as many are begun as the cluster has room for."""
        return not self._again and self._idle(cell) is not None

    def start(self, cell: Cell, store: Store) -> None:
        """Begins a cell on an idle actor."""
        self._idle(cell).run(_Task(cell, store))

    def finished(self, timeout: float) -> Iterator[tuple[Cell, dict[str, Any]]]:
        """The cells that ended, with their results. One whose worker is lost is begun again, three times in all."""
        for task in list(self._again):
            actor = self._idle(task.cell)
            if actor is not None:
                self._again.remove(task)
                actor.run(task)
        pending = {actor.waiting_for: actor for actor in self._actors if actor.waiting_for is not None}
        if not pending:
            time.sleep(timeout)
            return
        for reference in ray.wait(list(pending), num_returns=1, timeout=timeout)[0]:
            task = pending[reference].task
            result = self._take(pending[reference])
            if result is not None:
                yield task.cell, result

    def _idle(self, cell: Cell) -> _Actor | None:
        resources = (cell.gpus, cell.processes)
        same = [actor for actor in self._actors if actor.resources == resources]
        idle = [actor for actor in self._actors if actor.waiting_for is None]
        for actor in idle:
            if actor in same:
                return actor
        for actor in idle:  # holds what this cell's needs
            self._drop(actor)
        room = _room(*resources)
        if not room and not same:
            logger.warning("%s: waiting for a node with %g GPUs and %d CPUs; there is none", cell.name, *resources)
        wanted = max(1, room) if self.jobs is None else self.jobs - (len(self._actors) - len(same))
        self._actors += [_Actor(resources) for _ in range(wanted - len(same))]
        return None

    def _take(self, actor: _Actor) -> dict[str, Any] | None:
        """What an actor's call gave, if it was a cell that has ended."""
        task, reference = actor.task, actor.waiting_for
        actor.task = actor.waiting_for = None
        try:
            value = ray.get(reference)
        except RayError as error:
            self._drop(actor)
            return self._lost(task, error)
        self._failed_starts = 0
        if task is None:
            return None
        result, files = value
        if files is not None:
            with atomic_path(task.store.adapter_path(task.cell)) as folder:
                _unpack(files, folder)
        if result["status"] == "failed":
            self._drop(actor)  # who knows what the error left behind
        return result

    def _lost(self, task: _Task | None, error: RayError) -> dict[str, Any] | None:
        reason = str(error).strip().splitlines()[-1]
        if task is None:
            self._failed_starts += 1
            if self._failed_starts == _ATTEMPTS:
                remedy = "all nodes need peft-steer[train,eval] in the same version"
                raise EngineError(f"workers do not start on this cluster: {reason} ({remedy})") from error
            return None
        if isinstance(error, RayTaskError):
            return {"status": "failed", "error": reason, "traceback": str(error)}
        if task.attempt == _ATTEMPTS:
            return {"status": "failed", "error": f"its worker was lost {_ATTEMPTS} times: {reason}"}
        logger.warning("%s: its worker was lost, it begins again: %s", task.cell.name, reason)
        self._again.append(task._replace(attempt=task.attempt + 1))
        return None

    def _drop(self, actor: _Actor) -> None:
        self._actors.remove(actor)
        ray.kill(actor.handle)


def _knock(address: str) -> None:
    """Raises an `OSError` if nobody listens at HOST:PORT; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _room(gpus: float, processes: int) -> int:
    """How many cells the cluster's nodes can run at a time."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    rooms = [int(node.get("CPU", 0) // processes) for node in nodes]
    if gpus:
        rooms = [min(room, int(node.get("GPU", 0) // gpus)) for room, node in zip(rooms, nodes, strict=True)]
    return sum(rooms)


def _pack(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _unpack(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
