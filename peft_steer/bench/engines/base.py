"""What an engine is: workers that run cells."""

from collections.abc import Iterable
from typing import Any, Protocol

from peft_steer.bench.grid.plan import Cell
from peft_steer.bench.store import Store


class EngineError(RuntimeError):
    """No cell can be run: no workers start."""


class Engine(Protocol):
    """Workers that run cells. Leaving its context ends them, whatever they are doing."""

    def __enter__(self) -> "Engine": ...

    def __exit__(self, *_: object) -> None: ...

    def check(self, cells: list[Cell]) -> None:
        """Raises a `UsageError` if one of the cells cannot be run here."""

    def has_room(self, cell: Cell) -> bool:
        """Whether `start` may be called now."""

    def start(self, cell: Cell, store: Store) -> None:
        """Begins a cell."""

    def finished(self, timeout: float) -> Iterable[tuple[Cell, dict[str, Any]]]:
        """The cells that ended since the last call, with their results; waits for the first `timeout` seconds."""
