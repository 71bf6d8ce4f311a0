"""Cells on a Ray cluster, in actors that keep the base model loaded. Ray places them, restarts one whose node is lost,
and runs its cell again.

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
from typing import Any

from peft_steer.utils.errors import UsageError
from peft_steer.utils.files import atomic_path

from ..grid.plan import Cell
from ..run.multiprocess import shared_batch
from ..run.worker import Worker
from ..store import Store
from .base import EngineError


try:
    import ray
    from ray.exceptions import RayActorError, RayError, RayTaskError
except ImportError as error:
    raise UsageError("--engine ray needs Ray: pip install 'peft-steer[ray]'") from error

logger = logging.getLogger(__name__)

_RESTARTS = 2  # of a worker while it runs one cell


class _Remote:
    """The actor: a `Worker` whose adapters come and go as files."""

    def __init__(self) -> None:
        self._worker = Worker()

    def ready(self) -> None:
        """Returns when the actor runs."""

    def run(self, cell: Cell, files: dict[str, bytes] | None) -> tuple[dict[str, Any], dict[str, bytes] | None, bool]:
        """The result of a cell, the files of its adapter if it was trained here, and whether the actor was
        restarted."""
        with tempfile.TemporaryDirectory(prefix="peft-steer-") as folder:
            adapter = Path(folder) / cell.training_key
            if files is not None:
                adapter.mkdir()
                _unpack(files, adapter)
            result = self._worker.run(cell, adapter)
            trained = _pack(adapter) if files is None and adapter.is_dir() else None
            return result, trained, ray.get_runtime_context().was_current_actor_reconstructed


class _Actor:
    """An actor of the cluster, and what it does."""

    handle: Any  # Ray makes its methods

    def __init__(self, resources: tuple[float, int]):
        gpus, processes = self.resources = resources
        # An unreachable node costs several retries in a second, so it is the restarts that have a limit.
        options = {"max_restarts": _RESTARTS, "max_task_retries": -1}
        self.handle = ray.remote(_Remote).options(num_cpus=processes, num_gpus=gpus, **options).remote()
        self.pending: ray.ObjectRef | None = self.handle.ready.remote()
        self.cell: Cell | None = None
        self.store: Store | None = None
        self.started = False

    def run(self, cell: Cell, store: Store) -> None:
        path = store.adapter_path(cell)
        self.cell, self.store = cell, store
        self.pending = self.handle.run.remote(cell, _pack(path) if path.is_dir() else None)


class RayEngine:
    """Runs `jobs` cells at a time (by default as many as the cluster has room for) on actors that take `gpus` GPUs
    and a CPU for each process.

    Args:
        address: The cluster's, as `ray.init` takes it. Without one, `RAY_ADDRESS`; without that, a cluster of its own
            on this machine.
        jobs: At most so many cells at a time. A cluster that grows on demand grows to this.
    """

    def __init__(self, address: str | None = None, jobs: int | None = None):
        self.address, self.jobs = address, jobs
        self._actors: list[_Actor] = []
        self._owned = False

    def __enter__(self) -> "RayEngine":
        if not ray.is_initialized():
            address = self.address or os.environ.get("RAY_ADDRESS") or "local"
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            alone: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
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
        """Raises a `UsageError` if a cell's batch cannot be divided among its processes."""
        for cell in cells:
            if cell.processes > 1:
                shared_batch(cell)

    def has_room(self, cell: Cell) -> bool:
        """Whether an idle actor has the cell's resources. If not, as many are started as the cluster has room for."""
        self._make_room_for_lost()
        return self._idle(cell) is not None

    def start(self, cell: Cell, store: Store) -> None:
        """Begins a cell on an idle actor."""
        actor = self._idle(cell)
        assert actor is not None, "start() without has_room()"
        actor.run(cell, store)

    def finished(self, timeout: float) -> Iterator[tuple[Cell, dict[str, Any]]]:
        """The cells that ended, with their results."""
        self._make_room_for_lost()
        pending = {actor.pending: actor for actor in self._actors if actor.pending is not None}
        if not pending:
            time.sleep(timeout)
            return
        for reference in ray.wait(list(pending), num_returns=1, timeout=timeout)[0]:
            actor = pending[reference]
            if actor.cell is None:
                self._greet(actor)
            else:
                yield actor.cell, self._take(actor)

    def _idle(self, cell: Cell) -> _Actor | None:
        resources = (cell.gpus, cell.processes)
        same = [actor for actor in self._actors if actor.resources == resources]
        idle = [actor for actor in self._actors if actor.pending is None]
        for actor in idle:
            if actor in same:
                return actor
        for actor in idle:  # it holds resources that this cell needs
            self._drop(actor)
        room = _room(*resources)
        if not room and not same:
            logger.warning("%s: waiting for a node with %g GPUs and %d CPUs; there is none", cell.name, *resources)
        wanted = max(1, room) if self.jobs is None else self.jobs - (len(self._actors) - len(same))
        self._actors += [_Actor(resources) for _ in range(wanted - len(same))]
        return None

    def _make_room_for_lost(self) -> None:
        """Ray restarts lost actors as soon as there is room, and idle ones may hold it."""
        for actor in [actor for actor in self._actors if actor.pending is None]:
            running = [other for other in self._actors if other.started and other.resources == actor.resources]
            if len(running) > max(1, _room(*actor.resources)):
                self._drop(actor)

    def _greet(self, actor: _Actor) -> None:
        assert actor.pending is not None
        try:
            ray.get(actor.pending)
        except RayError as error:
            raise EngineError(
                f"workers do not start on this cluster: {_last_line(error)} (all nodes need peft-steer[train,eval] in "
                "the same version)"
            ) from error
        actor.pending, actor.started = None, True

    def _take(self, actor: _Actor) -> dict[str, Any]:
        """The result of the actor's cell, which has ended; its adapter is put into the store."""
        cell, store, reference = actor.cell, actor.store, actor.pending
        assert cell is not None
        assert store is not None
        assert reference is not None
        actor.cell = actor.store = actor.pending = None
        try:
            result, files, lost = ray.get(reference)
        except RayActorError as error:
            self._drop(actor)
            reason = f"its worker was lost {_RESTARTS + 1} times: {_last_line(error)}"
            return {"status": "failed", "error": reason}
        except RayTaskError as error:
            self._drop(actor)
            return {"status": "failed", "error": _last_line(error), "traceback": str(error)}
        if lost:
            logger.warning("%s: its worker was lost; Ray ran it again", cell.name)
        if files is not None:
            with atomic_path(store.adapter_path(cell)) as folder:
                _unpack(files, folder)
        if lost or result["status"] == "failed":  # its restarts are counted; the error may have left it in any state
            self._drop(actor)
        return result

    def _drop(self, actor: _Actor) -> None:
        self._actors.remove(actor)
        ray.kill(actor.handle)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


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
