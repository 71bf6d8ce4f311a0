"""What a comparison will take, before anything is loaded: from the shapes of the models and a few training examples.

A pass over one token multiplies every weight of the network once, which is two floating-point operations; backward
costs the same once more for the gradients of what is computed, and once more for those of trained weights. How many
operations a second this device does on such matrices is measured.
"""

import statistics
from dataclasses import dataclass

import torch
import torch.utils.benchmark
from lm_eval.api.task import ConfigurableTask
from transformers import AutoTokenizer

from peft_steer.evaluation.datasets import sft_dataset
from peft_steer.utils.devices import default_device

from .candidates import meta_model
from .plan import FULL, Cell


_EXAMPLES = 64
_GENERATED = 2  # a generated answer counts as if it were as long as its prompt
_ADAM_BYTES = 8  # two moments in float32
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Estimate:
    """Of one cell: `seconds` on this device, and `bytes` for weights, gradients and optimizer.

    What is kept for backward comes on top of the bytes: it depends on the batch, and `peft-steer cost` measures it.
    """

    seconds: float
    bytes: float


class Estimator:
    """Estimates cells; tasks and the sizes of models are looked at once."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._tasks: dict[tuple[str, str], tuple[float, int, int]] = {}
        self._speed: dict[str, float] = {}

    def __call__(self, cell: Cell, task: ConfigurableTask, trainable: int | None) -> Estimate:
        """Args: the cell, its task, and the number of its trainable parameters (None if it is not known)."""
        n = self._parameters(cell.source)
        tokens, documents, requests = self._task(cell, task)
        operations = 2 * n * tokens * min(documents, cell.limit or documents) * requests
        if cell.config:
            full = cell.config["peft_type"] == FULL
            rows = cell.train.get("per_device_train_batch_size", 8) * cell.train.get("gradient_accumulation_steps", 1)
            steps = cell.train.get("max_steps", 0)
            if steps <= 0:
                steps = cell.train.get("num_train_epochs", 3) * len(task.dataset[task.config.training_split]) / rows
            passes = 2 + full + bool(cell.train.get("gradient_checkpointing", True))
            if cell.trainer == "grpo":  # the rollouts, at their full length, and a pass without gradients
                tokens += cell.train.get("max_completion_length", 256)
                passes += 1
            elif cell.trainer == "dpo":  # two answers, and the reference's passes
                rows, passes = 2 * rows, passes + 1
            operations += 2 * passes * n * tokens * rows * steps
        size = 1 if cell.quantization else _BYTES[cell.dtype]
        weights = n * (0.5 if cell.quantization.get("load_in_4bit") else size)
        gradients = (trainable or 0) * (_BYTES[cell.dtype] + _ADAM_BYTES)
        return Estimate(operations / self._operations_per_second(cell.dtype), weights + gradients)

    def _parameters(self, source: str) -> int:
        if source not in self._sizes:
            self._sizes[source] = meta_model(source).num_parameters()
        return self._sizes[source]

    def _task(self, cell: Cell, task: ConfigurableTask) -> tuple[float, int, int]:
        """Tokens of a training example (mean), evaluated documents, and forward passes for each of them."""
        if (cell.source, cell.task) not in self._tasks:
            tokenizer = AutoTokenizer.from_pretrained(cell.source)
            pairs = sft_dataset(task)
            pairs = pairs.select(range(min(_EXAMPLES, len(pairs))))
            lengths = [len(tokenizer(pair["prompt"] + pair["completion"]).input_ids) for pair in pairs]
            docs = list(task.eval_docs)
            requests = _GENERATED
            if task.config.output_type != "generate_until":
                choices = [
                    tokenizer(choice, add_special_tokens=False).input_ids for choice in task.doc_to_choice(docs[0])
                ]
                # lm-eval scores all choices of one token in one pass
                requests = 1 if all(len(ids) == 1 for ids in choices) else len(choices)
            self._tasks[cell.source, cell.task] = statistics.fmean(lengths), len(docs), requests
        return self._tasks[cell.source, cell.task]

    def _operations_per_second(self, dtype: str) -> float:
        if dtype not in self._speed:
            device = default_device()
            x, w = (torch.randn(1024, 1024, dtype=getattr(torch, dtype), device=device) for _ in range(2))
            timer = torch.utils.benchmark.Timer("x @ w", globals={"x": x, "w": w}, num_threads=torch.get_num_threads())
            self._speed[dtype] = 2 * 1024**3 / timer.blocked_autorange(min_run_time=0.5).median
        return self._speed[dtype]
