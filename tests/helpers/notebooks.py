"""The notebooks in `examples`, and how they are run."""

import json
import os
import subprocess
import sys
from pathlib import Path


EXAMPLES = Path(__file__).parents[2] / "examples"


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def run(path: Path, folder: Path) -> str:
    """Runs a notebook's cells as one program in `folder`, and returns what it prints."""
    (folder / "cells.py").write_text("\n".join("".join(cell["source"]) for cell in code_cells(path)))
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    call = [sys.executable, "cells.py"]
    result = subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout
