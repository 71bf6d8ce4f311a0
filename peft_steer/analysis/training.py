"""Training an adapter by the KL divergence to a tuned model, with transformers' trainer.

TRL 1.16's `DistillationTrainer` samples from the student, and its experimental `GKDTrainer` wants chats: neither takes
a text with its answers as it is.
"""

import tempfile
import time
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from .texts import Batch, Texts


_FOREVER = 1_000_000


def train_by_kl(
    student: PeftModel,
    teacher: nn.Module,
    texts: Texts,
    learning_rate: float,
    seed: int,
    steps: int | None = None,
    seconds: float | None = None,
) -> int:
    """Trains `student` towards `teacher`'s predictions of the answers in `texts`.

    AdamW without weight decay and with warmup as in arXiv 2603.00425; for `steps` with a linear schedule, or at a
    constant rate until `seconds` have passed.

    Returns:
        The number of steps.
    """
    with tempfile.TemporaryDirectory(prefix="peft-steer-") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps or _FOREVER,
            learning_rate=learning_rate,
            lr_scheduler_type="linear" if steps else "constant_with_warmup",
            warmup_steps=0.03 if steps else 3,
            weight_decay=0.0,
            per_device_train_batch_size=texts.batch_size,
            seed=seed,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            use_cpu=texts.device == "cpu",
        )
        trainer = _KLTrainer(
            teacher,
            model=student,
            args=arguments,
            train_dataset=texts.rows,
            data_collator=lambda rows: vars(texts.batch(rows)),
            callbacks=[] if steps else [_Until(seconds)],
        )
        trainer.train()
    student.eval()
    return trainer.state.global_step


class _KLTrainer(Trainer):
    def __init__(self, teacher: nn.Module, **options: Any):
        super().__init__(**options)
        self.teacher = teacher

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        batch = Batch(**inputs)
        where = batch.predicts_answer
        with torch.no_grad():
            target = self.teacher(**batch.inputs(self.teacher)).logits[where].float().log_softmax(-1)
        outputs = model(**batch.inputs(model))
        found = outputs.logits[where].float().log_softmax(-1)
        loss = nn.functional.kl_div(found, target, reduction="batchmean", log_target=True)
        return (loss, outputs) if return_outputs else loss


class _Until(TrainerCallback):
    """Stops the training after some seconds."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_training_stop = time.perf_counter() - self.start >= self.seconds
