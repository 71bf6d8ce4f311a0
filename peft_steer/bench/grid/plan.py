"""The plan of a comparison: models, tasks, methods and seeds, and the cells that they mean.

The protocol is the paper's (arXiv 2603.00425): several learning rates for every method, the best one chosen on the
validation split, and only that one evaluated on the test split.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .trainers import merge


FULL = "full"  # the `peft_type` of full fine-tuning: every parameter, in the model's dtype
VERSION = 2  # of the cells' keys and of the results' format
_NAMES_AND_RESOURCES = ("name", "source", "forgetting", "gpus", "processes")  # do not decide a cell's result
_EVALUATION = ("split", "limit", "eval_batch_size", "forgetting_hash", "retention", "kl_prompts")
# Fields that came later. Left as they are, a cell has the key that it had before them: stores of results stay valid.
_LATER = {"trainer": "sft", "rewards": [], "prompt": {}, "retention": [], "kl_prompts": 0}
STEER_RATE = (
    "steer_learning_rate"  # beside the fields of a joint adapter's config: the learning rate of its steering half
)


def peft_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Of a cell's `config`, what PEFT's config takes."""
    return {key: value for key, value in config.items() if key != STEER_RATE}


def _hash_of(path: str | None) -> str | None:
    return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Model:
    """A model to adapt.

    Attributes:
        name: Directory or hub id, as the grid names it.
        source: What `from_pretrained` loads.
        dtype: Of the weights, or of the computation with quantized ones.
        quantization: Fields of `BitsAndBytesConfig`; empty for none.
        gpus: GPUs that a cell takes on a cluster; a part of one for several cells on each.
        processes: Processes that train a cell together, started by accelerate.
    """

    name: str
    source: str
    dtype: str = "float32"
    quantization: dict[str, Any] = field(default_factory=dict)
    gpus: float = 0
    processes: int = 1


@dataclass(frozen=True)
class Task:
    """A task of lm-eval with a training split.

    Attributes:
        limit: Documents to evaluate, None for all.
        train: Overrides of the grid's `train` for this task.
        metadata: Parameters of its data, as lm-eval's `--metadata`.
        rewards: Of `grpo`: "task" for the task's first metric, "METRIC,FILTER" for another one of it, and what
            `peft-steer grpo` knows as `reward_funcs`; empty for the task's first metric alone.
        prompt: `num_fewshot`, `apply_chat_template` and `system_instruction`, as lm-eval's flags.
    """

    name: str
    limit: int | None = None
    train: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    rewards: tuple[str, ...] = ()
    prompt: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """One way to adapt the model.

    Attributes:
        name: Its row in the table.
        config: A PEFT config's fields, `peft_type` among them; empty for the untrained base, `{"peft_type": "full"}`
            for full fine-tuning.
        learning_rates: Of which the best on the validation split is chosen; `(0.0,)` for the base.
        train: Overrides of the grid's `train` for this method.
        sweep: Fields of `config` and the values of which the best is chosen, together with the learning rate.
        matched: The integer field of `config` that the grid's `match` sets (by default `r`, where it is not given);
            None to leave the method as it is.
        trainer: `"sft"`, `"grpo"` or `"dpo"`.
    """

    name: str
    config: dict[str, Any]
    learning_rates: tuple[float, ...]
    train: dict[str, Any] = field(default_factory=dict)
    sweep: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    matched: str | None = None
    trainer: str = "sft"

    def variants(self) -> list[dict[str, Any]]:
        """The configs that `sweep` means."""
        return [
            {**self.config, **dict(zip(self.sweep, values, strict=True))}
            for values in itertools.product(*self.sweep.values())
        ]


@dataclass(frozen=True)
class Cell:
    """One training and its evaluation.

    Attributes:
        source, gpus, processes: As in `Model`.
        split: The evaluated one, `"validation"` or `"test"`.
        limit: Documents to evaluate, None for all.
        config: As in `Method`.
        train: Fields of the trainer's config in TRL; empty for the untrained base.
        metadata, rewards, prompt: As in `Task`.
        forgetting: A text file on which the loss is measured before and after the training; None for none.
        forgetting_hash: Of its content.
        trainer: As in `Method`.
        retention: Other tasks that are scored too: `name`, `limit` and `metadata` of each.
        kl_prompts: As in `Grid`.
    """

    name: str
    model: str
    source: str
    dtype: str
    quantization: dict[str, Any]
    task: str
    split: str
    limit: int | None
    eval_batch_size: int
    config: dict[str, Any]
    learning_rate: float
    seed: int
    train: dict[str, Any]
    metadata: dict[str, Any] = field(default_factory=dict)
    forgetting: str | None = None
    forgetting_hash: str | None = None
    gpus: float = 0
    processes: int = 1
    trainer: str = "sft"
    rewards: list[str] = field(default_factory=list)
    prompt: dict[str, Any] = field(default_factory=dict)
    retention: list[dict[str, Any]] = field(default_factory=list)
    kl_prompts: int = 0

    @property
    def key(self) -> str:
        """A hash that names the cell's result: of everything that decides it, so not of its name."""
        return self._hash(_NAMES_AND_RESOURCES)

    @property
    def training_key(self) -> str:
        """A hash that names the trained adapter, which several evaluations may share."""
        return self._hash((*_NAMES_AND_RESOURCES, *_EVALUATION))

    def _hash(self, without: tuple[str, ...]) -> str:
        defining = {k: v for k, v in asdict(self).items() if k not in without and _LATER.get(k, ...) != v}
        return hashlib.sha256(json.dumps([VERSION, defining], sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Contender:
    """A method on a model, as it will be trained: ranks matched, and seen to fit the model.

    Attributes:
        configs: The method's variants.
        trainable: The number of trainable parameters of each; None where only the weights tell.
    """

    model: Model
    method: Method
    configs: tuple[dict[str, Any], ...]
    trainable: tuple[int | None, ...]


@dataclass(frozen=True)
class Reference:
    """A published score.

    Attributes:
        method, task, model: What it is of, by the grid's names; no `model` for the grid's only one.
        score: Its value, in the units of the task's metric.
        n: Test items that it is a mean over, None if that is not known.
        source: Where it was published.
    """

    method: str
    task: str
    score: float
    source: str
    n: int | None = None
    model: str | None = None


@dataclass(frozen=True)
class Grid:
    """A comparison.

    Attributes:
        models, tasks, methods: Every method is trained on every model for every task.
        split: `"test"` for results, `"validation"` to look at the choices of rates alone.
        eval_batch_size: Documents per forward pass of the evaluation.
        seeds: Each method is trained once with each. Rates are chosen with the first alone.
        train: Fields of the trainers' configs in TRL, for all methods; see `trainers.py`.
        match: The name of the method whose number of parameters the others' ranks are to match.
        forgetting: A text file, see `Cell`.
        choose: What is other where a choice is made: `limit`, and fields of `train`, such as fewer steps.
        retention: Tasks of which it is asked what the training leaves of them, see `Cell`.
        kl_prompts: Prompts of the evaluated split on which the divergence from the base is measured; 0 for none.
        reference: Published scores to stand beside ours.
    """

    models: tuple[Model, ...]
    tasks: tuple[Task, ...]
    methods: tuple[Method, ...]
    split: str = "test"
    eval_batch_size: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)
    train: dict[str, Any] = field(default_factory=dict)
    match: str | None = None
    forgetting: str | None = None
    choose: dict[str, Any] = field(default_factory=dict)
    retention: tuple[dict[str, Any], ...] = ()
    kl_prompts: int = 0
    reference: tuple[Reference, ...] = ()

    def options(self, contenders: list[Contender]) -> Iterator[list[Cell]]:
        """The cells of each model, task and method with the first seed, on the split where a choice is made."""
        for contender, task in self._pairs(contenders):
            choices = list(itertools.product(contender.configs, contender.method.learning_rates))
            cells = [self._cell(contender, task, config, rate) for config, rate in choices]
            yield cells if len(cells) == 1 else [self._candidate(cell, task) for cell in cells]

    def repeated(self, cell: Cell) -> list[Cell]:
        """A chosen cell with every seed (the untrained base has no seed), as the grid reports it."""
        method = next(method for method in self.methods if method.name == cell.name)
        task = next(task for task in self.tasks if task.name == cell.task)
        reported: dict[str, Any] = {"limit": task.limit, "train": self._train(task, method), **self._reported()}
        return [replace(cell, seed=seed, **reported) for seed in (self.seeds if cell.config else [cell.seed])]

    def _candidate(self, cell: Cell, task: Task) -> Cell:
        """The cell by which a choice is made. What is kept of other tasks is measured where results are reported."""
        changes: dict[str, Any] = {"limit": self.choose.get("limit", task.limit)}
        if self.split != "validation":
            changes |= {"split": "validation", "retention": [], "kl_prompts": 0}
        train = {**cell.train, **merge(cell.trainer, self.choose.get("train", {}))}
        return replace(cell, train=train, **changes)

    def _reported(self) -> dict[str, Any]:
        return {"split": self.split, "retention": list(self.retention), "kl_prompts": self.kl_prompts}

    def _train(self, task: Task, method: Method) -> dict[str, Any]:
        return merge(method.trainer, self.train, task.train, method.train) if method.config else {}

    def _pairs(self, contenders: list[Contender]) -> Iterator[tuple[Contender, Task]]:
        for model in self.models:  # cells of one model follow each other: it is loaded once
            for task in self.tasks:
                for contender in contenders:
                    if contender.model == model:
                        yield contender, task

    def _cell(self, contender: Contender, task: Task, config: dict[str, Any], rate: float) -> Cell:
        model, method = contender.model, contender.method
        return Cell(
            name=method.name,
            model=model.name,
            source=model.source,
            dtype=model.dtype,
            quantization=model.quantization,
            task=task.name,
            limit=task.limit,
            eval_batch_size=self.eval_batch_size,
            config=config,
            learning_rate=rate,
            seed=self.seeds[0] if config else 0,
            train=self._train(task, method),
            trainer=method.trainer,
            metadata=task.metadata,
            rewards=list(task.rewards) if method.trainer == "grpo" else [],
            prompt=task.prompt,
            forgetting=self.forgetting,
            forgetting_hash=_hash_of(self.forgetting),
            gpus=model.gpus,
            processes=model.processes if config else 1,
            **self._reported(),
        )
