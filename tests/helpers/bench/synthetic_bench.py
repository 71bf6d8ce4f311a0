"""Cells and results as a grid would give them, without running it: for the tests of the report."""

import random
from dataclasses import replace
from typing import Any

from peft_steer.bench.grid.plan import Cell, Grid, Method, Model, Task


ENVIRONMENT = {"device": "x86_64 CPU, 1 threads", "python": "3.11.7", "torch": "2.13.0", "peft": "0.21.2"}

GRID = Grid(
    models=(Model("org/model-1B", source="somewhere"),),
    tasks=(Task("listops_short"),),
    methods=(Method("LoRA", {"peft_type": "LORA", "r": 8}, (1e-3, 1e-2)),),
)


def cell(name: str = "LoRA", learning_rate: float = 1e-3, **changes) -> Cell:
    config = {} if name == "base" else {"peft_type": "LORA", "r": 8, "task_type": "CAUSAL_LM"}
    made = Cell(
        name=name,
        model="org/model-1B",
        source="",
        dtype="float32",
        quantization={},
        task="listops_short",
        split="test",
        limit=None,
        eval_batch_size=8,
        config=config,
        learning_rate=learning_rate if config else 0.0,
        seed=0,
        train={"max_steps": 30, "per_device_train_batch_size": 4, "weight_decay": 0.1} if config else {},
    )
    return replace(made, **changes)


def result(cell: Cell, accuracy: float, n: int = 200, **changes) -> dict[str, Any]:
    """A finished cell that got about `accuracy` of `n` items right: the same hard items whatever the method."""
    luck = random.Random(cell.name + cell.key)
    scores = [float(random.Random(i).gauss(0, 1) + luck.gauss(0, 0.5) < 2.5 * (accuracy - 0.5)) for i in range(n)]
    mean = sum(scores) / n
    trained = bool(cell.config)
    size = 10_000 * (1 + len(cell.name))
    return {
        "status": "done",
        "metric": "acc",
        "score": mean,
        "stderr": (mean * (1 - mean) / (n - 1)) ** 0.5,
        "n": n,
        "items": {"ids": [f"hash {i}" for i in range(n)], "scores": scores},
        "trainable": size if trained else 0,
        "parameters": 10_000_000,
        "train_seconds": 60.0 + len(cell.name) if trained else None,
        "train_tokens": 24_000 if trained else None,
        "peak_bytes": 2_000_000_000 + 1000 * size if trained else None,
        "saved_bytes": 400_000_000 + 500 * size if trained else None,
        "adapter_bytes": 4 * size if trained else None,
        "decode_ratio": 1.07 if trained else None,
        "forgetting": {"before": 3.1, "after": 3.1 + cell.learning_rate} if trained else None,
        "loss": [[step, 2.0 / step + luck.random() / 10] for step in range(1, 31)] if trained else None,
        "environment": ENVIRONMENT,
        **changes,
    }


def failed(error: str = "RuntimeError: out of memory") -> dict[str, Any]:
    return {"status": "failed", "error": error, "traceback": error}


def sweep_and_test(name: str, rates: dict[float, float], chosen: float, n_seeds: int = 3) -> list[tuple[Cell, dict]]:
    """A validation cell for each rate with its accuracy, then the chosen one on the test split with every seed."""
    cells = [cell(name, rate, split="validation") for rate in rates]
    cells += [cell(name, chosen, seed=seed) for seed in range(n_seeds)]
    return [(c, result(c, rates[c.learning_rate])) for c in cells]
