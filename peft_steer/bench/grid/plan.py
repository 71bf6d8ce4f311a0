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


FULL = "full"  # the `peft_type` of full fine-tuning: every parameter, in the model's dtype
VERSION = 2  # of the cells' keys and of the results' format
_NAMES_AND_RESOURCES = ("name", "source", "forgetting", "gpus", "processes")  # do not decide a cell's result
_EVALUATION = ("split", "limit", "eval_batch_size", "forgetting_hash")


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
    """

    name: str
    limit: int | None = None
    train: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


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
    """

    name: str
    config: dict[str, Any]
    learning_rates: tuple[float, ...]
    train: dict[str, Any] = field(default_factory=dict)
    sweep: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    matched: str | None = None

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
        train: Fields of TRL's `SFTConfig`; empty for the untrained base.
        metadata: As in `Task`.
        forgetting: A text file on which the loss is measured before and after the training; None for none.
        forgetting_hash: Of its content.
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

    @property
    def key(self) -> str:
        """A hash that names the cell's result: of everything that decides it, so not of its name."""
        return self._hash(_NAMES_AND_RESOURCES)

    @property
    def training_key(self) -> str:
        """A hash that names the trained adapter, which several evaluations may share."""
        return self._hash((*_NAMES_AND_RESOURCES, *_EVALUATION))

    def _hash(self, without: tuple[str, ...]) -> str:
        defining = {k: v for k, v in asdict(self).items() if k not in without}
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
class Grid:
    """A comparison.

    Attributes:
        models, tasks, methods: Every method is trained on every model for every task.
        split: `"test"` for results, `"validation"` to look at the choices of rates alone.
        eval_batch_size: Documents per forward pass of the evaluation.
        seeds: Each method is trained once with each. Rates are chosen with the first alone.
        train: Fields of TRL's `SFTConfig`, for all methods.
        match: The name of the method whose number of parameters the others' ranks are to match.
        forgetting: A text file, see `Cell`.
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

    def groups(self, contenders: list[Contender]) -> Iterator[list[Cell]]:
        """The cells of each model, task and method with the first seed, on the split where a choice is made."""
        for contender, task in self._pairs(contenders):
            choices = list(itertools.product(contender.configs, contender.method.learning_rates))
            split = "validation" if len(choices) > 1 else self.split
            yield [self._cell(contender, task, config, rate, self.seeds[0], split) for config, rate in choices]

    def repeated(self, cell: Cell) -> list[Cell]:
        """A chosen cell with every seed (the untrained base has no seed), on the grid's split."""
        seeds = self.seeds if cell.config else [cell.seed]
        return [replace(cell, seed=seed, split=self.split) for seed in seeds]

    def _pairs(self, contenders: list[Contender]) -> Iterator[tuple[Contender, Task]]:
        for model in self.models:  # cells of one model follow each other: it is loaded once
            for task in self.tasks:
                for contender in contenders:
                    if contender.model == model:
                        yield contender, task

    def _cell(
        self, contender: Contender, task: Task, config: dict[str, Any], rate: float, seed: int, split: str
    ) -> Cell:
        model, method = contender.model, contender.method
        return Cell(
            name=method.name,
            model=model.name,
            source=model.source,
            dtype=model.dtype,
            quantization=model.quantization,
            task=task.name,
            split=split,
            limit=task.limit,
            eval_batch_size=self.eval_batch_size,
            config=config,
            learning_rate=rate,
            seed=seed if config else 0,
            train={**self.train, **task.train, **method.train} if config else {},
            metadata=task.metadata,
            forgetting=self.forgetting,
            forgetting_hash=_hash_of(self.forgetting),
            gpus=model.gpus,
            processes=model.processes if config else 1,
        )
