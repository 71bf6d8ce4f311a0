"""`make gpu-check` on a tiny model, on whatever device there is: every section runs, and a wrong edit is seen."""

import importlib.util
from pathlib import Path

import pytest
import torch

from peft_steer.interventions.low_rank import LowRank


@pytest.fixture(scope="module")
def gpu_check():
    path = Path(__file__).parents[2] / "recipes/gpu_check.py"
    spec = importlib.util.spec_from_file_location("gpu_check", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(capsys) -> list[list[str]]:
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if row[-1] in ("ok", "FAILED")]


def test_every_section_passes(gpu_check, capsys):
    assert gpu_check.main(["--shape", "tiny"]) == 0
    rows = table(capsys)
    assert {row[0] for row in rows} == set(gpu_check.SECTIONS)
    assert all(row[-1] == "ok" for row in rows)
    exactness = [row[1] for row in rows if row[0] == "exactness"]
    assert len(exactness) == 2 * len(gpu_check.PRESETS)


def test_an_edit_that_is_wrong_in_half_precision_fails(gpu_check, capsys, monkeypatch):
    right = LowRank.forward

    def wrong(self, h, scale):
        return right(self, h, scale if h.dtype == torch.float32 else 1.1 * scale)

    monkeypatch.setattr(LowRank, "forward", wrong)
    assert gpu_check.main(["--shape", "tiny", "--only", "exactness"]) == 1
    failed = {row[1].split()[0] for row in table(capsys) if row[-1] == "FAILED"}
    assert "post_block_linear" in failed
    assert "vector" not in failed


def test_a_section_that_raises_does_not_hide_the_others(gpu_check, capsys, monkeypatch):
    def broken(folder, tiny):
        raise RuntimeError("no kernel")
        yield

    monkeypatch.setitem(gpu_check.SECTIONS, "cost", broken)
    assert gpu_check.main(["--shape", "tiny", "--only", "cost", "compile"]) == 1
    rows = table(capsys)
    assert ["RuntimeError: no kernel" in row[2] for row in rows] == [True, False, False, False]
