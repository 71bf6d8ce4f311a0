"""Nothing is made on the wrong device: training, generation, positions, analyses and more on a fake accelerator.

The device has to be registered with torch, which then is the accelerator of the whole process: one other process runs
all of `fake_gpu_checks.py`, and each of its checks is a test here.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import HEAD_KINDS, KINDS


CHECKS = Path(__file__).parent / "helpers" / "processes" / "fake_gpu_checks.py"
NAMES = [f"train {name}" for name in (*KINDS, *HEAD_KINDS, "joint")]
NAMES += [
    decorator.args[0].value
    for function in ast.parse(CHECKS.read_text()).body
    if isinstance(function, ast.FunctionDef)
    for decorator in function.decorator_list
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, str]:
    """The traceback of each check, empty if it passed."""
    path = tmp_path_factory.mktemp("fake-gpu") / "results.json"
    result = subprocess.run([sys.executable, CHECKS, path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_on_a_fake_gpu(results, name):
    assert not results[name], results[name]


def test_every_check_is_a_test(results):
    assert sorted(results) == sorted(NAMES)
