"""The notebooks are kept with their outputs, and run."""

import re

import pytest
from notebooks import EXAMPLES, code_cells, run


NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
ELSEWHERE = {"serve_with_vllm"}  # in vLLM's own environment: tests/serving/vllm


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
    assert f"({path.name})" in (EXAMPLES / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem not in ELSEWHERE], ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path):
    run(path, tmp_path)
