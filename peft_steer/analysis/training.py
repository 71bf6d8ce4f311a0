"""Training an adapter by the KL divergence to a tuned model, with transformers' trainer.

TRL 1.16's `DistillationTrainer` samples from the student, and its experimental `GKDTrainer` wants chats: neither takes
a text with its answers as it is.
"""

import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint

from .texts import Batch, Texts


_FOREVER = 1_000_000


def train_by_kl(
    student: PeftModel,
    teacher: nn.Module,
    texts: Texts,
    learning_rate: float,
    seed: int,
    folder: Path,
    steps: int | None = None,
    seconds: float | None = None,
) -> tuple[int, float]:
    """Trains `student` towards `teacher`'s predictions of the answers in `texts`.

    AdamW without weight decay and with warmup as in arXiv 2603.00425; for `steps` with a linear schedule, or at a
    constant rate until `seconds` have passed. The last checkpoint in `folder` is gone on from.

    Returns:
        The number of steps, and the seconds they took.
    """
    clock = _Clock(seconds)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps or _FOREVER,
        learning_rate=learning_rate,
        lr_scheduler_type="linear" if steps else "constant_with_warmup",
        warmup_steps=0.03 if steps else 3,
        weight_decay=0.0,
        per_device_train_batch_size=texts.batch_size,
        seed=seed,
        logging_steps=10,
        save_steps=50,
        save_total_limit=1,
        restore_callback_states_from_checkpoint=True,
        disable_tqdm=seconds is not None,  # (it would count to a million)
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
        callbacks=[clock],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    student.eval()
    (clock,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, _Clock))
    return trainer.state.global_step, clock.seconds


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


class _Clock(TrainerCallback, ExportableState):
    """Counts the seconds of a training, those before an interruption included, and stops it after `limit`."""

    def __init__(self, limit: float | None):
        self.limit, self.seconds = limit, 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._last = time.perf_counter()
        self._bar = tqdm(total=self.limit, initial=self.seconds, disable=self.limit is None, desc="Training", unit="s")

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._bar.close()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        now = time.perf_counter()
        self._bar.update(now - self._last)
        self.seconds, self._last = self.seconds + now - self._last, now
        if self.limit is not None and self.seconds >= self.limit:
            control.should_training_stop = control.should_save = True

    def state(self) -> dict[str, dict[str, Any]]:
        return {"args": {"limit": self.limit}, "attributes": {"seconds": self.seconds}}
