"""Training an adapter by the KL divergence to a tuned model, with transformers' trainer.

TRL 1.16's `DistillationTrainer` samples from the student, and its experimental `GKDTrainer` wants chats: neither takes
a text with its answers as it is.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
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

from ..inputs.texts import Batch, Texts


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

    AdamW without weight decay, with the warmup and the linear schedule of arXiv 2603.00425, over `steps` or over
    `seconds`. The last checkpoint in `folder` is gone on from.

    Returns:
        The number of steps, and the seconds they took.
    """
    clock = _Clock(seconds)
    checkpoint, state = _last_checkpoint(folder)
    if state is not None:
        clock.seconds = state.stateful_callbacks["_Clock"]["attributes"]["seconds"]
        if state.global_step == steps or not clock.left:
            set_peft_model_state_dict(student, load_peft_weights(checkpoint, device=texts.device))
            student.eval()
            return state.global_step, clock.seconds
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps or _FOREVER,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.03,
        weight_decay=0.0,
        per_device_train_batch_size=texts.batch_size,
        seed=seed,
        logging_steps=10,
        save_steps=50,
        save_total_limit=1,
        disable_tqdm=seconds is not None,  # (it would count to a million)
        report_to="none",
        remove_unused_columns=False,
        use_cpu=texts.device == "cpu",
        dataloader_pin_memory=False,  # the collator's tensors are where they are needed
    )
    trainer = _KLTrainer(
        teacher,
        clock,
        model=student,
        args=arguments,
        train_dataset=texts.rows,
        data_collator=lambda rows: vars(texts.batch(rows)),
        callbacks=[clock],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    student.eval()
    return trainer.state.global_step, clock.seconds


def _last_checkpoint(folder: Path) -> tuple[str | None, TrainerState | None]:
    """The last complete checkpoint and the state in it; one that was being written when the run ended is deleted."""
    while (path := get_last_checkpoint(folder) if folder.is_dir() else None) is not None:
        try:
            return path, TrainerState.load_from_json(str(Path(path) / "trainer_state.json"))  # (written last)
        except (FileNotFoundError, json.JSONDecodeError):
            shutil.rmtree(path)
    return None, None


class _KLTrainer(Trainer):
    def __init__(self, teacher: nn.Module, clock: "_Clock", **options: Any):
        super().__init__(**options)
        self.teacher, self.clock = teacher, clock

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.clock.limit is None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = 3  # steps
        self.lr_scheduler = LambdaLR(
            optimizer or self.optimizer, lambda step: min(1, (step + 1) / warmup) * self.clock.left
        )
        return self.lr_scheduler

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
    """Counts the seconds of a training, which its checkpoints keep, and stops it after `limit`."""

    def __init__(self, limit: float | None):
        self.limit, self.seconds = limit, 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._last = time.perf_counter()
        self._bar = tqdm(
            total=self.limit,
            initial=self.seconds,
            disable=self.limit is None,
            bar_format="Training: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s",
        )

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._bar.close()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        now = time.perf_counter()
        self._bar.update(now - self._last)
        self.seconds, self._last = self.seconds + now - self._last, now
        if not self.left:
            control.should_training_stop = control.should_save = True

    @property
    def left(self) -> float:
        """The part of the time that is left; 1 without a limit."""
        return 1.0 if self.limit is None else max(0.0, 1 - self.seconds / self.limit)

    def state(self) -> dict[str, dict[str, Any]]:
        return {"args": {"limit": self.limit}, "attributes": {"seconds": self.seconds}}
