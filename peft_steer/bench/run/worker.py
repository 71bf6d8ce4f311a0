"""What a worker process does with a cell, on this machine or on a node of a cluster."""

import json
import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..grid.plan import Cell
from .multiprocess import launch


logger = logging.getLogger(__name__)


class Worker:
    """Runs cells, one after the other. The base model stays loaded between cells that share it."""

    def __init__(self) -> None:
        self._runner: Callable[[Cell, Path], dict[str, Any]] | None = None

    def run(self, cell: Cell, adapter_dir: Path) -> dict[str, Any]:
        """Runs a cell; its errors are results, too.

        Args:
            cell: What to do. If its `processes` are several, they are started for it and end with it.
            adapter_dir: The folder of the trained adapter, now or later.

        Returns:
            The cell's result, of JSON's types only: what was measured and "done", or the error and "failed".
        """
        try:
            if cell.processes > 1:
                return launch(cell, adapter_dir)
            if self._runner is None:
                from .cell import Runner  # the slow imports

                self._runner = Runner()
            return json.loads(json.dumps({"status": "done", **self._runner(cell, adapter_dir)}))
        except Exception as error:  # any error belongs into this cell's row
            logger.exception("%s failed", cell.name)
            return {
                "status": "failed",
                "error": f"{type(error).__name__}: {error}",
                "traceback": traceback.format_exc(),
            }
