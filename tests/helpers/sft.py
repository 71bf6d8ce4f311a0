"""TRL's trainer on a few sums, in seconds."""

from pathlib import Path

import transformers as tf
from datasets import Dataset
from peft import PeftConfig, PeftModel
from trl import SFTConfig, SFTTrainer


def sums() -> Dataset:
    return Dataset.from_list(
        [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(6) for b in range(6)],
    )


def sft_trainer(
    model: tf.PreTrainedModel | PeftModel,
    tokenizer: str | Path,
    output: str | Path,
    peft_config: PeftConfig | None = None,
    trainer_options: dict | None = None,
    **options,
) -> SFTTrainer:
    """Six steps, a checkpoint after each third one; `options` are fields of `SFTConfig`."""
    settings = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "seed": 3}
    settings |= {"max_steps": 6, "save_steps": 3, "logging_steps": 1, "learning_rate": 0.01}
    settings |= {"per_device_train_batch_size": 4, **options}
    return SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(output), **settings),
        train_dataset=sums(),
        processing_class=tf.AutoTokenizer.from_pretrained(tokenizer),
        peft_config=peft_config,
        **(trainer_options or {}),
    )


def losses(trainer: SFTTrainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]
