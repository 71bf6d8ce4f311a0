"""One cell of a comparison: train a method with TRL's `SFTTrainer`, evaluate it with lm-eval, measure its costs."""

import logging
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import peft
import torch
import transformers
import trl
from peft import get_peft_config
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from lm_eval_tasks.model import PeftSteerLM
from peft_steer import tasks
from peft_steer.bench.memory import peak_bytes, reset_peak
from peft_steer.bench.plan import FULL, Cell
from peft_steer.cost import saved_bytes


class Runner:
    """Runs cells, one after the other."""

    def __call__(self, cell: Cell, adapter_dir: Path) -> dict[str, Any]:
        """Trains and evaluates a cell; `adapter_dir` is where its adapter is saved."""
        return run_cell(cell, cell.source, adapter_dir)


def run_cell(cell: Cell, model_path: str, adapter_dir: Path) -> dict[str, Any]:
    """Trains and evaluates one cell.

    Args:
        cell: What to do.
        model_path: What `from_pretrained` loads; `cell.model` says which weights these are.
        adapter_dir: Where the trained adapter is saved; a whole model, fully fine-tuned, is not.

    Returns:
        Accuracy with its standard error and n, and the costs: sizes in bytes, times in seconds, None where the
        untrained base has none.
    """
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # about its own and TRL's code
    transformers.set_seed(cell.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, cell.dtype)).to(device)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    task, manager = tasks.load_task(cell.task)
    tasks.evaluate_on(task, cell.split)
    costs: dict[str, Any] = dict.fromkeys(("train_seconds", "peak_bytes", "saved_bytes", "adapter_bytes", "loss"))
    costs |= {"trainable": 0, "parameters": model.num_parameters()}
    if cell.config:
        model, trained = _train(cell, model, tokenizer, task, adapter_dir)
        costs |= trained
    return {**costs, **_evaluate(cell, model, tokenizer, task, manager), "environment": _environment(device)}


def _train(
    cell: Cell, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Any, adapter_dir: Path
) -> tuple[PreTrainedModel | peft.PeftModel, dict[str, Any]]:
    full = cell.config["peft_type"] == FULL
    pairs = tasks.sft_dataset(task)
    arguments = {"bf16": False, "logging_steps": 10, "disable_tqdm": False, **cell.train}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(adapter_dir),
            learning_rate=cell.learning_rate,
            seed=cell.seed,
            save_strategy="no",
            completion_only_loss=True,  # its default looks for the untokenized columns
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            **arguments,
        ),
        train_dataset=tasks.tokenize(pairs, tokenizer, end=task.config.output_type == "generate_until"),
        processing_class=tokenizer,
        peft_config=None if full else get_peft_config(dict(cell.config)),
    )
    reset_peak()
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    peak = peak_bytes()
    trained = trainer.model
    if not full:  # a whole model for every cell would fill the disk
        trained.save_pretrained(adapter_dir)
    n_rows = min(trainer.args.per_device_train_batch_size, len(trainer.train_dataset))
    rows = [trainer.train_dataset[i] for i in range(n_rows)]
    batch = {name: value.to(trained.device) for name, value in trainer.data_collator(rows).items()}
    if full:
        trainable = parameters = trained.num_parameters()
        weights = sum(p.nbytes for p in trained.parameters())
    else:
        trainable, parameters = trained.get_nb_trainable_parameters()
        weights = (adapter_dir / "adapter_model.safetensors").stat().st_size
    return trained, {
        "trainable": trainable,
        "parameters": parameters,
        "train_seconds": seconds,
        "peak_bytes": peak,
        "saved_bytes": saved_bytes(trained, batch),
        "adapter_bytes": weights,
        "loss": [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
    }


def _evaluate(
    cell: Cell, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, task: Any, manager: Any
) -> dict[str, Any]:
    output = lm_eval.simple_evaluate(
        model=PeftSteerLM(pretrained=model, tokenizer=tokenizer, batch_size=cell.eval_batch_size),
        tasks=[task],
        limit=cell.limit,
        task_manager=manager,
        log_samples=False,
    )
    scores = output["results"][cell.task]
    metric = next(name for name in scores if "," in name and "_stderr," not in name)
    name, filter_name = metric.split(",")
    return {
        "metric": name,
        "score": scores[metric],
        "stderr": scores[f"{name}_stderr,{filter_name}"],
        "n": output["n-samples"][cell.task]["effective"],
    }


def _environment(device: str) -> dict[str, str]:
    libraries = (torch, transformers, peft, trl, lm_eval)
    versions = {library.__name__: library.__version__ for library in libraries}
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device == "cuda" else cpu
    return {"device": name, "python": platform.python_version(), **versions}
