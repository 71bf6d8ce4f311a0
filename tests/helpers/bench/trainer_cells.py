"""Cells of every trainer on a tiny model; as a script, a runner that can be killed."""

import sys
from pathlib import Path

from bench_cells import LORA, STEER, make_cell

from peft_steer.bench.engines import make_engine
from peft_steer.bench.grid.plan import Cell
from peft_steer.bench.scheduler import run_cells
from peft_steer.bench.store import Store


GRPO = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "max_completion_length": 2,
    "temperature": 1.0,
    "gradient_checkpointing": False,
}


def grpo_cell(source: str, name: str, config: dict, **changes) -> Cell:
    """Three steps of four rollouts on short lists."""
    few = {"n_train": 64, "n_validation": 16, "n_test": 16}
    changes = {"train": GRPO, "trainer": "grpo", "task": "list_max_min", "metadata": few, **changes}
    return make_cell(source, name, config, **changes)


def some_cells(source: str) -> list[Cell]:
    """The second takes minutes."""
    endless = {**GRPO, "max_steps": 10**6}
    return [grpo_cell(source, "steering", STEER), grpo_cell(source, "endless", LORA, train=endless)]


if __name__ == "__main__":
    with make_engine() as engine:
        run_cells(some_cells(sys.argv[1]), Store(Path(sys.argv[2])), engine)
