"""
Preference optimization with TRL's `DPOTrainer`. With a multiple-choice task, the right choice is preferred to a wrong
one.

    peft-steer dpo --config recipes/smollm2-135m/dpo/post_block.yaml [--any_trl_flag VALUE] [--r 4]
    accelerate launch --config_file recipes/accelerate_configs/ddp.yaml -m peft_steer.train.dpo --config RECIPE
"""

import sys
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer, ScriptArguments

from peft_steer.evaluation.datasets import dpo_dataset
from peft_steer.utils.errors import UsageError
from peft_steer_cli import main as console

from .arguments import Arguments
from .run import Command, task_datasets


def _prepare(arguments: Arguments, task: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    if arguments.task.reward_metric is not None:
        raise UsageError("reward_metric: only grpo has a reward")
    seed = arguments.training.seed
    return task_datasets(arguments, lambda split: dpo_dataset(task, split, seed, **arguments.task.chat))


main = Command("dpo", ScriptArguments, DPOConfig, DPOTrainer, _prepare).run

if __name__ == "__main__":
    sys.exit(console(["dpo", *sys.argv[1:]]))
