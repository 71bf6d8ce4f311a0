"""How a cell makes its prompts: in training and in evaluation alike."""

from typing import Any

from lm_eval.api.task import ConfigurableTask

from peft_steer.evaluation import tasks
from peft_steer.evaluation.splits import complete_splits

from ..grid.plan import Cell


def task_of(cell: Cell) -> ConfigurableTask:
    """The cell's task with all its splits, to be evaluated on the cell's one."""
    task, _ = tasks.load_task(cell.task, num_fewshot=cell.prompt.get("num_fewshot"), metadata=cell.metadata)
    complete_splits(task)
    tasks.evaluate_on(task, cell.split)
    return task


def chat_of(cell: Cell) -> dict[str, Any]:
    """What makes a prompt a conversation, as `peft_steer.evaluation` takes it."""
    return {name: value for name, value in cell.prompt.items() if name != "num_fewshot"}
