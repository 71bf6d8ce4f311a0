"""Trains a cell with one of TRL's trainers and measures what that costs."""

import tempfile
import time
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_config
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_steer import JointOptimizer, acting_parameters
from peft_steer.utils.devices import has_accelerator

from ..grid.plan import FULL, STEER_RATE, Cell, peft_fields
from ..store import save_training
from .memory import ReservedMemory, peak_bytes, reset_peak
from .optimizer import OptimizerCost
from .trainers import dpo, grpo, sft


_TRAINERS = {"sft": sft, "grpo": grpo, "dpo": dpo}


def train(
    cell: Cell, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Any, adapter_dir: Path
) -> tuple[PreTrainedModel | PeftModel, dict[str, Any]]:
    """Trains, and keeps the adapter in `adapter_dir`. A whole model, fully fine-tuned, is not kept.

    Returns:
        The trained model, and the costs of its training.
    """
    module, full = _TRAINERS[cell.trainer], cell.config["peft_type"] == FULL
    with tempfile.TemporaryDirectory(prefix="peft-steer-") as unused:
        arguments = {
            "bf16": False,
            "logging_steps": 1 if cell.trainer == "grpo" else 10,
            "disable_tqdm": False,
            **cell.train,
            "output_dir": unused,
            "learning_rate": cell.learning_rate,
            "seed": cell.seed,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": not has_accelerator(),
        }
        peft_config = None if full else get_peft_config(peft_fields(cell.config))
        common = {"model": model, "processing_class": tokenizer, "peft_config": peft_config}
        trainer = module.make(cell, task, arguments, common)
        if STEER_RATE in cell.config:
            trainer.optimizer_cls_and_kwargs = JointOptimizer.as_in(
                trainer.args, trainer.model, lora_lr=cell.learning_rate, steer_lr=float(cell.config[STEER_RATE])
            )
        reserved, optimizer = ReservedMemory(), OptimizerCost()
        trainer.add_callback(reserved)
        trainer.add_callback(optimizer)
        reset_peak()
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    trained, history = trainer.model, trainer.state.log_history
    costs = {
        "train_seconds": seconds,
        "train_tokens": next((entry["num_tokens"] for entry in reversed(history) if "num_tokens" in entry), None),
        "peak_bytes": peak_bytes(),
        "reserved_bytes": reserved.summary(),
        "loss": [(entry["step"], entry["loss"]) for entry in history if "loss" in entry],
        "curves": {
            name: [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]
            for key, name in module.CURVES.items()
        },
        **optimizer.summary(),
        **module.figures(trainer),
    }
    if full:  # not kept: a whole model for every cell would fill the disk
        costs["trainable"] = costs["parameters"] = trained.num_parameters()
        costs["adapter_bytes"] = sum(p.nbytes for p in trained.parameters())
        return trained, costs
    costs["trainable"], costs["parameters"] = acting_parameters(trained), trained.get_nb_trainable_parameters()[1]

    def save(folder: Path) -> None:
        trained.save_pretrained(folder)
        costs["adapter_bytes"] = (folder / "adapter_model.safetensors").stat().st_size

    save_training(adapter_dir, save, costs)
    return trained, costs
