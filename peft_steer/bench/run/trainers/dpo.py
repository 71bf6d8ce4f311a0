"""A cell's training by TRL's `DPOTrainer`: the right choice is preferred to a wrong one."""

from typing import Any

from trl import DPOConfig, DPOTrainer

from peft_steer.evaluation.datasets import dpo_dataset

from ...grid.plan import Cell
from ..prompts import chat_of
from .sft import seen_rows


CURVES = {"rewards/margins": "margin", "rewards/accuracies": "preferred"}


def make(cell: Cell, task: Any, arguments: dict[str, Any], common: dict[str, Any]) -> DPOTrainer:
    """The trainer. The reference is the base: the adapter switched off, or a copy if the whole model is trained."""
    return DPOTrainer(
        args=DPOConfig(**arguments),
        train_dataset=dpo_dataset(task, seed=cell.seed, **chat_of(cell)),
        **common,
    )


def figures(trainer: DPOTrainer) -> dict[str, Any]:
    """What only this trainer can tell after training."""
    return {"train_samples": seen_rows(trainer), "saved_bytes": None}
