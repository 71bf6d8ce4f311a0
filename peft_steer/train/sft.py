"""
Supervised fine-tuning with TRL's `SFTTrainer`.

    peft-steer sft --config recipes/smollm2-135m/sft/post_block.yaml [--any_trl_flag VALUE] [--r 4]
    accelerate launch --config_file recipes/accelerate_configs/ddp.yaml -m peft_steer.train.sft --config RECIPE
"""

import sys
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments, SFTConfig, SFTTrainer

from peft_steer import JointSteerLoraConfig, SteerConfig
from peft_steer.evaluation.datasets import sft_dataset, tokenize
from peft_steer.utils.errors import UsageError
from peft_steer_cli import main as console

from .arguments import Arguments
from .run import Command, task_datasets


def _prepare(arguments: Arguments, task: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    if arguments.task.reward_metric is not None:
        raise UsageError("reward_metric: only grpo has a reward")
    training, config = arguments.training, arguments.peft_config
    steer = config.steer_config() if isinstance(config, JointSteerLoraConfig) else config
    wrapped = training.packing and training.packing_strategy == "wrapped"
    if wrapped and isinstance(steer, SteerConfig) and steer.positions != "all":
        raise UsageError(
            f"packing_strategy: 'wrapped' does not say where the prompts are that positions={steer.positions!r} "
            "refers to; use 'bfd'"
        )
    if training.eos_token is not None:
        tokenizer.eos_token = training.eos_token

    def make(split: str) -> datasets.Dataset:
        pairs = sft_dataset(task, split, **arguments.task.chat)
        if arguments.task.apply_chat_template:
            return pairs  # TRL tokenizes them by the template
        return tokenize(pairs, tokenizer, end=task.config.output_type == "generate_until")

    if task is not None and training.completion_only_loss is None:
        training.completion_only_loss = True  # its default looks for the untokenized columns
    return task_datasets(arguments, make)


main = Command("sft", ScriptArguments, SFTConfig, SFTTrainer, _prepare).run

if __name__ == "__main__":
    sys.exit(console(["sft", *sys.argv[1:]]))
