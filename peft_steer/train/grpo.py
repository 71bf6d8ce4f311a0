"""
Reinforcement learning with TRL's `GRPOTrainer`. With a task, its metric is the reward.

    peft-steer grpo --config recipes/smollm2-135m/grpo/post_block.yaml [--any_trl_flag VALUE] [--r 4]
    accelerate launch --config_file recipes/accelerate_configs/ddp.yaml -m peft_steer.train.grpo --config RECIPE
"""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import (
    accuracy_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)
from trl.scripts.grpo import GRPOScriptArguments

from peft_steer.evaluation.datasets import grpo_dataset
from peft_steer.evaluation.rewards import reward_function
from peft_steer.utils.errors import UsageError, suggest
from peft_steer_cli import main as console

from .arguments import Arguments
from .rollouts import check_rollouts
from .run import Command, task_datasets


_TASK = "task"  # the name of the task's own metric in `reward_funcs`


def _prepare(arguments: Arguments, task: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    check_rollouts(arguments.training, arguments.peft_config)
    rewards = _rewards(arguments, task)
    data = task_datasets(arguments, lambda split: grpo_dataset(task, split, **arguments.task.chat))
    return {**data, "reward_funcs": rewards}


def _rewards(arguments: Arguments, task: Any) -> list[Callable | str]:
    """As TRL's script: names of its rewards or dotted paths, and `task` for the task's metric."""
    names = arguments.script.reward_funcs or ([_TASK] if task is not None else [])
    model = arguments.script.reward_model_name_or_path
    if not names and not model:
        raise UsageError("reward_funcs: is missing; name a `task`, a function or a reward model")
    if arguments.task.reward_metric and _TASK not in names:
        raise UsageError(f"reward_metric: the task's metric is not among `reward_funcs`; add {_TASK!r} to them")
    return [
        *([model] if model else []),
        *(reward(name, task, arguments.task.reward_metric, arguments.task.apply_chat_template) for name in names),
    ]


def reward(name: str, task: Any, metric: str | None = None, chat: bool = False) -> Callable:
    """One of `reward_funcs`: `task`, a name of TRL's, or the dotted path of a function.

    Args:
        name: Which.
        task: The lm-eval task, None if the data come from no task.
        metric: Of the task, "metric,filter"; None for its first.
        chat: Whether its prompts are chat messages.

    Raises:
        UsageError: If there is none of that name, or it cannot read such prompts.
    """
    if name == _TASK:
        if task is None:
            raise UsageError(f"reward_funcs: {_TASK!r} is the metric of a task; name one with `task`")
        return reward_function(task, metric)
    known: dict[str, Any] = {
        "accuracy_reward": accuracy_reward,
        "reasoning_accuracy_reward": reasoning_accuracy_reward,
        "think_format_reward": think_format_reward,
        "get_soft_overlong_punishment": get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256),
    }
    if name in known:
        if task is not None and not chat and name != "get_soft_overlong_punishment":
            raise UsageError(f"reward_funcs: {name!r} reads chat messages; set `apply_chat_template: true`")
        return known[name]
    if "." not in name:
        raise UsageError(f"reward_funcs: unknown {name!r}{suggest(name, [_TASK, *known])}")
    module, function = name.rsplit(".", 1)
    sys.path.insert(0, os.getcwd())  # as TRL's script finds the user's own
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"reward_funcs: {name!r} cannot be imported: {error}") from error


main = Command("grpo", GRPOScriptArguments, GRPOConfig, GRPOTrainer, _prepare).run


if __name__ == "__main__":
    sys.exit(console(["grpo", *sys.argv[1:]]))
