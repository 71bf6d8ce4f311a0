"""Training an adapter by the KL divergence to a tuned model, with transformers' trainer.

Neither of TRL 1.16's takes texts with their answers: `DistillationTrainer` samples from the student, and the
experimental `GKDTrainer` needs chats.
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


_NO_LIMIT = 1_000_000


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
    `seconds`. A training that was interrupted resumes from the last checkpoint in `folder`.

    Returns:
        The number of steps, and the seconds that they took.
    """
    clock = _Clock(seconds)
    checkpoint, state = _last_checkpoint(folder) or (None, None)
    if checkpoint is not None and state is not None:
        saved: Any = state.stateful_callbacks  # its annotation is a list; it is a dictionary
        clock.seconds = saved["_Clock"]["attributes"]["seconds"]
        if state.global_step == steps or not clock.left:
            set_peft_model_state_dict(student, load_peft_weights(checkpoint, device=str(texts.device)))
            student.eval()
            return state.global_step, clock.seconds
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps or _NO_LIMIT,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.03,
        weight_decay=0.0,
        per_device_train_batch_size=texts.batch_size,
        seed=seed,
        logging_steps=10,
        save_steps=50,
        save_total_limit=1,
        disable_tqdm=seconds is not None,  # (the bar would count to a million)
        report_to="none",
        remove_unused_columns=False,
        use_cpu=texts.device.type == "cpu",
        dataloader_pin_memory=False,  # the collator's tensors are on the device already
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


def _last_checkpoint(folder: Path) -> tuple[str, TrainerState] | None:
    """The last complete checkpoint and its state. Deletes one that was being written when the run ended."""
    while (path := get_last_checkpoint(folder) if folder.is_dir() else None) is not None:
        try:
            return path, TrainerState.load_from_json(str(Path(path) / "trainer_state.json"))  # (written last)
        except (FileNotFoundError, json.JSONDecodeError):
            shutil.rmtree(path)
    return None


class _KLTrainer(Trainer):
    def __init__(self, teacher: nn.Module, clock: "_Clock", **options: Any):
        super().__init__(**options)
        self.teacher, self.clock = teacher, clock

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.clock.limit is None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = 3  # steps
        optimizer = optimizer or self.optimizer
        assert optimizer is not None
        self.lr_scheduler = LambdaLR(optimizer, lambda step: min(1, (step + 1) / warmup) * self.clock.left)
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        batch = Batch(**inputs)
        where = batch.predicts_answer
        with torch.no_grad():
            target = self.teacher(**batch.inputs(self.teacher)).logits[where].float().log_softmax(-1)
        outputs = model(**batch.inputs(model))
        prediction = outputs.logits[where].float().log_softmax(-1)
        loss = nn.functional.kl_div(prediction, target, reduction="batchmean", log_target=True)
        return (loss, outputs) if return_outputs else loss


class _Clock(TrainerCallback, ExportableState):
    """Counts the seconds of a training, across checkpoints, and stops it after `limit`."""

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
