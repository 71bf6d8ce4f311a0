"""Whether the grid's tasks can be trained on and scored as it says, before a model is loaded."""

from typing import Any

from peft_steer.evaluation.datasets import dpo_dataset
from peft_steer.evaluation.tasks import docs_of, load_tasks
from peft_steer.utils.errors import UsageError

from .plan import Grid, Task


def check_tasks(grid: Grid, loaded: dict[str, Any]) -> None:
    """Checks a grid and its tasks, by name.

    Raises:
        UsageError: If a task does not generate what is rewarded, has no wrong answers, or a retained task is unknown.
    """
    trainers = {method.trainer for method in grid.methods if method.config}
    for task in grid.tasks:
        try:
            _check(task, loaded[task.name], trainers, grid.kl_prompts)
        except ValueError as error:
            raise UsageError(f"task {task.name!r}: {error}") from error
    for entry in grid.retention:
        try:
            load_tasks(entry["name"], entry["metadata"])
        except ValueError as error:
            raise UsageError(f"retention: {error}") from error


def _check(task: Task, loaded: Any, trainers: set[str], kl_prompts: int) -> None:
    if "grpo" in trainers:
        from ..run.trainers.grpo import rewards  # slow imports

        docs_of(loaded, "train", ("generate_until",))
        rewards(list(task.rewards), loaded, bool(task.prompt.get("apply_chat_template")))
    if "dpo" in trainers:
        dpo_dataset(loaded)
    if kl_prompts and loaded.config.output_type != "generate_until":
        raise UsageError("kl_prompts: the task generates nothing; remove it")
