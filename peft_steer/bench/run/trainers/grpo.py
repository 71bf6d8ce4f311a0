"""A cell's training by TRL's `GRPOTrainer`: the task's metric is the reward."""

import time
from typing import Any

import torch
from trl import GRPOConfig, GRPOTrainer

from peft_steer.evaluation.datasets import grpo_dataset
from peft_steer.train.grpo import reward
from peft_steer.train.rollouts import check_rollouts
from peft_steer.utils.devices import has_accelerator

from ...grid.plan import Cell
from ..prompts import chat_of


CURVES = {
    "reward": "reward",
    "reward_std": "reward_std",
    "frac_reward_zero_std": "no_signal",
    "kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "length",
}


class _Timed(GRPOTrainer):
    """`GRPOTrainer` that keeps the time of its rollouts and the number of their tokens (of this process)."""

    rollout_seconds = 0.0
    rollout_tokens = 0

    def _generate(self, prompts: list) -> Any:
        start = time.perf_counter()
        generated = super()._generate(prompts)
        if has_accelerator():
            torch.accelerator.synchronize()
        self.rollout_seconds += time.perf_counter() - start
        self.rollout_tokens += sum(len(ids) for ids in generated[1])
        return generated


def make(cell: Cell, task: Any, arguments: dict[str, Any], common: dict[str, Any]) -> GRPOTrainer:
    """The trainer.

    Raises:
        ValueError: If the rollouts would not be the adapter's, or a reward is unknown.
    """
    training = GRPOConfig(**arguments)
    check_rollouts(training, common["peft_config"])
    return _Timed(
        args=training,
        reward_funcs=rewards(cell.rewards, task, bool(cell.prompt.get("apply_chat_template"))),
        train_dataset=grpo_dataset(task, **chat_of(cell)),
        **common,
    )


def rewards(names: list[str], task: Any, chat: bool) -> list[Any]:
    """The functions that `rewards` names: of the task's metrics, TRL's own, or of the user's modules."""
    return [
        reward("task", task, metric=name, chat=chat) if "," in name else reward(name, task, chat=chat)
        for name in names or ["task"]
    ]


def figures(trainer: _Timed) -> dict[str, Any]:
    """What only this trainer can tell after training."""
    args = trainer.args
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    lengths = [entry[key] for entry in trainer.state.log_history if (key := "completions/mean_length") in entry]
    return {
        "train_samples": trainer.state.global_step * batch,
        "saved_bytes": None,
        "rollout_seconds": trainer.rollout_seconds,
        "rollout_tokens_per_second": trainer.rollout_tokens / trainer.rollout_seconds,
        "length": lengths[-1] if lengths else None,
    }
