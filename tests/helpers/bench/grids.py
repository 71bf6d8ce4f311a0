"""Small grids for the tests of the benchmark."""

from pathlib import Path

import yaml

from peft_steer.bench.grid.candidates import contenders
from peft_steer.bench.grid.parse import load_grid
from peft_steer.bench.grid.plan import Cell
from peft_steer.bench.grid.protocol import planned


LORA = {"name": "LoRA", "peft_type": "LORA", "r": 2, "target_modules": "all-linear", "learning_rate": 0.01}
STEER = {"name": "post-block", "peft_type": "STEER", "kind": "nonlinear", "r": 2, "learning_rate": 0.01}
BASE = {"name": "base", "peft_type": "base"}
FULL = {"name": "full", "peft_type": "full", "learning_rate": 0.001}
LOFIT = {"name": "LoFiT", "peft_type": "STEER", "site": "heads", "kind": "lofit", "learning_rate": 0.01}
LOFIT |= {"num_heads": 3, "selection_step": 2}
JOLA = {"name": "JoLA", "peft_type": "STEER", "site": "heads", "kind": "jola", "learning_rate": 0.01}


def write_grid(folder: Path, **changes) -> Path:
    grid = {
        "model": "unset",
        "task": "listops_short",
        "limit": 40,
        "seeds": [0],
        "train": {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1},
        "methods": [BASE, LORA, STEER],
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({**grid, **changes}))
    return path


def cells_of(path: Path) -> list[Cell]:
    """The cells that a grid means, those of the sweep first."""
    grid = load_grid(path)
    sweep, final = planned(grid, contenders(grid)[0])
    return [*sweep, *final]
