"""A cell's training by TRL's `SFTTrainer`: on the task's own answers."""

import math
from typing import Any

from trl import SFTConfig, SFTTrainer

from peft_steer.cost import saved_bytes
from peft_steer.evaluation.datasets import sft_dataset, tokenize

from ...grid.plan import Cell
from ..prompts import chat_of


CURVES: dict[str, str] = {}


def make(cell: Cell, task: Any, arguments: dict[str, Any], common: dict[str, Any]) -> SFTTrainer:
    """The trainer. `arguments` are those of all configurations, `common` those of all trainers."""
    pairs = sft_dataset(task, **chat_of(cell))
    if not cell.prompt.get("apply_chat_template"):  # TRL tokenizes messages itself
        pairs = tokenize(pairs, common["processing_class"], end=task.config.output_type == "generate_until")
    return SFTTrainer(
        args=SFTConfig(completion_only_loss=True, **arguments),  # its default looks for the untokenized columns
        train_dataset=pairs,
        **common,
    )


def figures(trainer: Any) -> dict[str, Any]:
    """What only this trainer can tell after training."""
    n_rows = min(trainer.args.per_device_train_batch_size, len(trainer.train_dataset))
    rows = [trainer.train_dataset[i] for i in range(n_rows)]
    device = trainer.model.device
    batch = {name: value.to(device) for name, value in trainer.data_collator(rows).items()}
    return {"train_samples": seen_rows(trainer), "saved_bytes": saved_bytes(trainer.model, batch)}


def seen_rows(trainer: Any) -> int:
    """The rows that were trained on, those seen again counted again. An epoch's last batch may be smaller."""
    args, n_rows = trainer.args, len(trainer.train_dataset)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    epochs, steps = divmod(trainer.state.global_step, math.ceil(n_rows / batch))
    return epochs * n_rows + min(steps * batch, n_rows)
