"""Cells for the tests of what runs them; as a script, a runner that can be killed."""

import sys
from pathlib import Path
from typing import Any

from peft_steer.bench.engines import make_engine
from peft_steer.bench.grid.plan import Cell
from peft_steer.bench.scheduler import run_cells
from peft_steer.bench.store import Store


LORA = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
STEER = {"peft_type": "STEER", "kind": "nonlinear", "r": 2, "task_type": "CAUSAL_LM"}
WRONG = {**LORA, "target_modules": ["no_such_module"]}
MEASURED = ("status", "metric", "score", "stderr", "n", "items", "loss", "trainable", "adapter_bytes", "error")


def make_cell(source: str, name: str, config: dict[str, Any], **changes: Any) -> Cell:
    """A cell of a second or two on a tiny model."""
    fields = {
        "model": "tiny",
        "dtype": "float32",
        "quantization": {},
        "task": "listops_short",
        "split": "test",
        "limit": 8,
        "eval_batch_size": 8,
        "learning_rate": 0.01 if config else 0.0,
        "seed": 0,
        "train": {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1} if config else {},
    }
    return Cell(name=name, source=source, config=config, **{**fields, **changes})


def some_cells(source: str) -> list[Cell]:
    """The second fails."""
    return [
        make_cell(source, "base", {}),
        make_cell(source, "wrong", WRONG),
        make_cell(source, "LoRA", LORA),
        make_cell(source, "steering", STEER),
    ]


def measured(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What does not depend on who ran the cells, and when."""
    return [{name: result.get(name) for name in MEASURED} for result in results]


if __name__ == "__main__":
    with make_engine() as engine:
        run_cells(some_cells(sys.argv[1]), Store(Path(sys.argv[2])), engine)
