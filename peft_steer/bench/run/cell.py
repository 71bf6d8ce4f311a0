"""One cell of a comparison: train a method with TRL's `SFTTrainer`, evaluate it with lm-eval, measure its costs."""

import json
import math
import platform
import statistics
import tempfile
import time
import warnings
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import peft
import torch
import transformers
import trl
from peft import PeftModel, get_peft_config
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import SFTConfig, SFTTrainer

from peft_steer.cost import saved_bytes
from peft_steer.cost.measure import greedy_decoding, interleaved_seconds
from peft_steer.cost.methods import share
from peft_steer.evaluation import tasks
from peft_steer.evaluation.datasets import sft_dataset, tokenize
from peft_steer.evaluation.lm import PeftSteerLM
from peft_steer.evaluation.scoring import score
from peft_steer.evaluation.splits import complete_splits
from peft_steer.utils.bitsandbytes import keep_unpacked

from ..grid.plan import FULL, Cell
from ..store import read_training, save_training
from .forgetting import text_loss
from .memory import ReservedMemory, peak_bytes, reset_peak


_DECODED_TOKENS, _DECODING_ROUNDS = 8, 5


class Runner:
    """Runs cells in turn. The base model stays loaded between cells of one model; each cell gets modules and hooks of
    its own around the same weights."""

    def __init__(self) -> None:
        self._loaded: tuple[Any, ...] = ()
        self._sums: list[float] = []

    def __call__(self, cell: Cell, adapter_dir: Path) -> dict[str, Any]:
        """Trains and evaluates one cell.

        Args:
            cell: What to do.
            adapter_dir: Where the trained adapter is saved, in one step. If it is there, it is loaded and not trained
                again. A whole model, fully fine-tuned, is not kept.

        Returns:
            The score with its standard error and n, the score of each document, and the costs: sizes in bytes, times
            in seconds, losses in nats per token; None where the untrained base has none.
        """
        datasets.disable_progress_bars()
        transformers.logging.set_verbosity_error()
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # its own and TRL's code
        created_at, start = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.perf_counter()
        base, tokenizer = self._base(cell)
        task, _ = tasks.load_task(cell.task, metadata=cell.metadata)
        complete_splits(task)
        tasks.evaluate_on(task, cell.split)
        full = cell.config.get("peft_type") == FULL
        names = ("train_seconds", "train_tokens", "train_samples", "peak_bytes", "reserved_bytes", "saved_bytes")
        costs = dict.fromkeys((*names, "adapter_bytes", "decode_ratio", "loss", "forgetting"))
        costs |= {"trainable": 0, "parameters": base.num_parameters()}
        before = text_loss(base, tokenizer, cell.forgetting) if cell.forgetting and cell.config else None
        transformers.set_seed(cell.seed)
        model = base if full else share(base)
        if cell.config:
            trained = read_training(adapter_dir)
            if trained is None:
                model, trained = _train(cell, model, tokenizer, task, adapter_dir)
            else:
                model = PeftModel.from_pretrained(model, adapter_dir)
                start -= trained["train_seconds"]  # it took that time too, in another cell
            costs |= trained
        if before is not None:
            costs["forgetting"] = {"before": before, "after": text_loss(model, tokenizer, cell.forgetting)}
        if cell.config and not full:
            costs["decode_ratio"] = _decode_ratio(base, model, tokenizer)
        harness = PeftSteerLM(pretrained=model, tokenizer=tokenizer, batch_size=cell.eval_batch_size)
        scores = _of_items(score(harness, task, cell.limit), cell.task)
        if full or self._sums != _sums(base):  # some PEFT initializations write into the base
            self._loaded = ()
        costs |= {"created_at": created_at, "total_seconds": time.perf_counter() - start}
        return {**costs, **scores, "environment": _environment(base.device)}

    def _base(self, cell: Cell) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        wanted = (cell.source, cell.dtype, json.dumps(cell.quantization, sort_keys=True))
        if self._loaded[:1] != (wanted,):
            self._loaded = ()  # before the next one needs the memory
            model = _load(cell)
            self._loaded = (wanted, model, AutoTokenizer.from_pretrained(cell.source))
            self._sums = _sums(model)
        return self._loaded[1:]


def _of_items(scores: dict[str, Any], task: str) -> dict[str, Any]:
    """The scores with those of items as numbers, by which methods are compared."""
    try:
        scores["items"]["scores"] = [float(value) for value in scores["items"]["scores"]]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{task}: its metric {scores['metric']!r} scores a whole corpus, not single items, on which methods are "
            "compared; choose a task whose first metric is a mean over items"
        ) from error
    return scores


def _load(cell: Cell) -> PreTrainedModel:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments: dict[str, Any] = {"dtype": getattr(torch, cell.dtype)}
    if cell.quantization:
        arguments["quantization_config"] = BitsAndBytesConfig(**cell.quantization)
        arguments["device_map"] = {"": device}
        model = AutoModelForCausalLM.from_pretrained(cell.source, **arguments)
        keep_unpacked(model)
        return model
    return AutoModelForCausalLM.from_pretrained(cell.source, **arguments).to(device)


def _sums(model: torch.nn.Module) -> list[float]:
    return [parameter.detach().double().sum().item() for parameter in model.parameters()]


def _train(
    cell: Cell, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Any, adapter_dir: Path
) -> tuple[PreTrainedModel | PeftModel, dict[str, Any]]:
    full = cell.config["peft_type"] == FULL
    pairs = sft_dataset(task)
    arguments = {"bf16": False, "logging_steps": 10, "disable_tqdm": False, **cell.train}
    with tempfile.TemporaryDirectory(prefix="peft-steer-") as unused:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=unused,
                learning_rate=cell.learning_rate,
                seed=cell.seed,
                save_strategy="no",
                completion_only_loss=True,  # its default looks for the untokenized columns
                report_to="none",
                use_cpu=not torch.cuda.is_available(),
                **arguments,
            ),
            train_dataset=tokenize(pairs, tokenizer, end=task.config.output_type == "generate_until"),
            processing_class=tokenizer,
            peft_config=None if full else get_peft_config(dict(cell.config)),
        )
        reserved = ReservedMemory()
        trainer.add_callback(reserved)
        reset_peak()
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    trained = trainer.model
    costs = {
        "train_seconds": seconds,
        "train_tokens": next(e["num_tokens"] for e in reversed(trainer.state.log_history) if "num_tokens" in e),
        "train_samples": _samples(trainer),
        "peak_bytes": peak_bytes(),
        "reserved_bytes": reserved.summary(),
        "loss": [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
    }
    n_rows = min(trainer.args.per_device_train_batch_size, len(trainer.train_dataset))
    rows = [trainer.train_dataset[i] for i in range(n_rows)]
    batch = {name: value.to(trained.device) for name, value in trainer.data_collator(rows).items()}
    costs["saved_bytes"] = saved_bytes(trained, batch)
    if full:  # not kept: a whole model for every cell would fill the disk
        costs["trainable"] = costs["parameters"] = trained.num_parameters()
        costs["adapter_bytes"] = sum(p.nbytes for p in trained.parameters())
        return trained, costs
    costs["trainable"], costs["parameters"] = trained.get_nb_trainable_parameters()

    def save(folder: Path) -> None:
        trained.save_pretrained(folder)
        costs["adapter_bytes"] = (folder / "adapter_model.safetensors").stat().st_size

    save_training(adapter_dir, save, costs)
    return trained, costs


def _samples(trainer: SFTTrainer) -> int:
    """The rows that were trained on, those seen again counted again. An epoch's last batch may be smaller."""
    args, n_rows = trainer.args, len(trainer.train_dataset)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    epochs, steps = divmod(trainer.state.global_step, math.ceil(n_rows / batch))
    return epochs * n_rows + min(steps * batch, n_rows)


def _decode_ratio(base: PreTrainedModel, adapted: PeftModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Time of a token, decoded with the cache, divided by the base's: the median over rounds of both in turn."""
    prompt = tokenizer("The quick brown fox", return_tensors="pt").input_ids.to(base.device)
    functions = {
        name: greedy_decoding(m, prompt, _DECODED_TOKENS) for name, m in (("base", base), ("adapted", adapted))
    }
    seconds = interleaved_seconds(functions, _DECODING_ROUNDS, base.device, seed=0, label="Decoding")
    return statistics.median(a / b for a, b in zip(seconds["adapted"], seconds["base"], strict=True))


def _environment(device: torch.device) -> dict[str, str]:
    libraries = (torch, transformers, datasets, peft, trl, lm_eval)
    versions = {library.__name__: library.__version__ for library in libraries}
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    return {"device": name, "python": platform.python_version(), **versions}
