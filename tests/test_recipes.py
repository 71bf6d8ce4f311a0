"""The grids that ship can be run as written."""

from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from peft_steer.bench.plan import load_grid
from peft_steer.tasks import OUR_TASKS


GRIDS = sorted((Path(__file__).parents[1] / "recipes" / "bench").glob("*.yaml"))


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_shipped_grids(path):
    grid = load_grid(path)
    assert grid.task in TaskManager(include_path=str(OUR_TASKS), include_defaults=False).all_tasks
    assert len({cell.key for cell in grid.cells("weights")}) >= 7


def test_the_demo_compares_what_it_says():
    quickstart, rates = (load_grid(GRIDS[0].parent / name) for name in ("quickstart.yaml", "quickstart_rates.yaml"))
    assert quickstart.split == "test"
    assert rates.split == "validation"
    assert {**quickstart.train, "max_steps": None} == {**rates.train, "max_steps": None}
    # Every rate of the demo was chosen in the sweep, for the same method.
    swept = {method.name: method for method in rates.methods}
    for method in quickstart.methods[1:]:
        assert method.config == swept[method.name].config
        assert set(method.learning_rates) <= set(swept[method.name].learning_rates)
