"""The grids that ship can be run as written."""

from dataclasses import replace
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from peft_steer.bench.grid.parse import load_grid
from peft_steer.evaluation.tasks import OUR_TASKS


GRIDS = sorted((Path(__file__).parents[3] / "recipes" / "bench").glob("*.yaml"))


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_shipped_grids(path):
    grid = load_grid(path)
    known = TaskManager(include_path=str(OUR_TASKS), include_defaults=False).all_tasks
    assert {task.name for task in grid.tasks} <= set(known)
    assert len(grid.methods) >= 4


def test_the_part_that_was_run_is_a_part():
    """Cells of the small grid are cells of the large one, whose run goes on from them."""
    part, whole = (load_grid(GRIDS[0].parent / name) for name in ("listops_135m_part.yaml", "listops_135m.yaml"))
    assert replace(part, methods=()) == replace(whole, methods=())
    methods = {method.name: method for method in whole.methods}
    for method in part.methods:
        assert replace(method, learning_rates=()) == replace(methods[method.name], learning_rates=())
        assert set(method.learning_rates) <= set(methods[method.name].learning_rates)


def test_the_demo_compares_what_it_says():
    quickstart, rates = (load_grid(GRIDS[0].parent / name) for name in ("quickstart.yaml", "quickstart_rates.yaml"))
    assert quickstart.split == "test"
    assert rates.split == "validation"
    assert {**quickstart.train, "max_steps": None} == {**rates.train, "max_steps": None}
    # Every rate of the demo was chosen in the sweep, for the same method.
    swept = {method.name: method for method in rates.methods}
    not_swept = ("base", "LoFiT", "JoLA")
    for method in (method for method in quickstart.methods if method.name not in not_swept):
        assert method.config == swept[method.name].config
        assert set(method.learning_rates) <= set(swept[method.name].learning_rates)
