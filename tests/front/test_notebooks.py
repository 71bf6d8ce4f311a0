"""The notebooks are kept with their outputs, and run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def text_of(outputs: list[dict]) -> str:
    return "".join("".join(output.get("text", "")) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept(path):
    outputs = [output for cell in code_cells(path) for output in cell["outputs"]]
    assert all(cell["execution_count"] for cell in code_cells(path))
    assert not any(output["output_type"] == "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    printed = text_of(outputs)
    assert not re.search(r"/(root|home|tmp|work|Users)/", printed), "a path of the machine that it ran on"
    assert f"examples/{path.name}" in path.read_text()  # its badge


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path):
    """Their cells, as one program."""
    (tmp_path / "cells.py").write_text("\n".join("".join(cell["source"]) for cell in code_cells(path)))
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    call = [sys.executable, "cells.py"]
    result = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr[-2000:]
