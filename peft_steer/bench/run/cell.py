"""One cell of a comparison: train a method, evaluate it with lm-eval, measure its costs."""

import json
import logging
import platform
import statistics
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import peft
import torch
import transformers
import trl
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from peft_steer.cost.measure import greedy_decoding, interleaved_seconds
from peft_steer.cost.methods import share
from peft_steer.evaluation.lm import PeftSteerLM
from peft_steer.evaluation.scoring import score
from peft_steer.utils.bitsandbytes import keep_unpacked
from peft_steer.utils.devices import default_device, device_name

from ..grid.plan import FULL, Cell
from ..store import read_training
from .divergence import divergence
from .forgetting import text_loss
from .prompts import chat_of, task_of
from .retention import kept
from .training import train


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
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its hints are for people who write tasks
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # its own and TRL's code
        created_at, start = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
        base, tokenizer = self._base(cell)
        task = task_of(cell)
        full = cell.config.get("peft_type") == FULL
        names = ("train_seconds", "train_tokens", "train_samples", "peak_bytes", "reserved_bytes", "saved_bytes")
        costs = dict.fromkeys((*names, "adapter_bytes", "decode_ratio", "loss", "forgetting", "retention", "curves"))
        costs |= {"trainable": 0, "parameters": base.num_parameters()}
        before = text_loss(base, tokenizer, cell.forgetting) if cell.forgetting and cell.config else None
        transformers.set_seed(cell.seed)
        # Adapters on the same weights froze them.
        model: Any = base.requires_grad_(True) if full else share(base)
        if cell.config:
            trained = read_training(adapter_dir)
            if trained is None:
                model, trained = train(cell, model, tokenizer, task, adapter_dir)
            else:
                model = PeftModel.from_pretrained(model, adapter_dir)
                start -= trained["train_seconds"]  # it took that time too, in another cell
            costs |= trained
        if before is not None and cell.forgetting is not None:
            costs["forgetting"] = {"before": before, "after": text_loss(model, tokenizer, cell.forgetting)}
        if isinstance(model, PeftModel):
            costs["decode_ratio"] = _decode_ratio(base, model, tokenizer)
        harness = PeftSteerLM(pretrained=model, tokenizer=tokenizer, batch_size=cell.eval_batch_size)
        scores = _of_items(score(harness, task, cell.limit, **chat_of(cell)), cell.task)
        if cell.retention:
            costs["retention"] = {name: _of_items(scores, name) for name, scores in kept(harness, cell.retention)}
        if cell.kl_prompts and cell.config:
            reference = _load(cell) if full or self._sums != _sums(base) else base
            costs |= divergence(model, reference, tokenizer, task, cell)
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
    device = default_device()
    arguments: dict[str, Any] = {"dtype": getattr(torch, cell.dtype)}
    if cell.quantization:
        arguments["quantization_config"] = BitsAndBytesConfig(**cell.quantization)
        arguments["device_map"] = {"": device}
        model = AutoModelForCausalLM.from_pretrained(cell.source, **arguments)
        keep_unpacked(model)
        return model
    model = AutoModelForCausalLM.from_pretrained(cell.source, **arguments)
    return model.to(device)  # type: ignore[arg-type]  # as transformers wraps it


def _sums(model: torch.nn.Module) -> list[float]:
    return [parameter.detach().double().sum().item() for parameter in model.parameters()]


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
    return {"device": device_name(device), "python": platform.python_version(), **versions}
