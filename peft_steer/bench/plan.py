"""The plan of a comparison: a YAML file, checked as a whole before anything is loaded, and the cells that it means."""

import dataclasses
import hashlib
import json
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import yaml
from trl import SFTConfig

import peft_steer  # noqa: F401  (registers the tuner types)
from peft_steer.suggest import suggest


# What the bench sets itself, so a grid's `train` may not.
_OURS = {"output_dir", "learning_rate", "seed", "save_strategy", "report_to", "use_cpu", "completion_only_loss"}
VERSION = 2  # of the cells' keys and of the results' format
_NAMES_AND_RESOURCES = ("name", "source", "gpus", "processes")  # do not decide a cell's result
_EVALUATION = ("split", "limit", "eval_batch_size")
FULL = "full"  # the `peft_type` of full fine-tuning: every parameter, in the grid's dtype
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Method:
    """One way to adapt the model.

    Attributes:
        name: Its row in the table.
        config: A PEFT config's fields, `peft_type` among them; empty for the untrained base, `{"peft_type": "full"}`
            for full fine-tuning.
        learning_rates: One cell each; `[0.0]` for the base.
        train: Overrides of the grid's `train` for this method.
    """

    name: str
    config: dict[str, Any]
    learning_rates: tuple[float, ...]
    train: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One training and its evaluation.

    Attributes:
        source: What `from_pretrained` loads; `model` says which weights these are.
        gpus: GPUs that the cell takes; a part of one for several cells on each.
        processes: Processes that train the cell together.
        train: Fields of TRL's `SFTConfig`; empty for the untrained base.
        limit: Documents to evaluate, None for all.
    """

    name: str
    model: str
    dtype: str
    task: str
    split: str
    limit: int | None
    eval_batch_size: int
    config: dict[str, Any]
    learning_rate: float
    seed: int
    train: dict[str, Any]
    source: str = ""
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
        defining = {k: v for k, v in dataclasses.asdict(self).items() if k not in without}
        return hashlib.sha256(json.dumps([VERSION, defining], sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Grid:
    """A comparison: one model, one task, some methods, each with its learning rates, and some seeds.

    Attributes:
        model: Directory or hub id.
        task: Name of an lm-eval task with a training split.
        methods: The rows.
        dtype: Of the base's weights.
        split: The evaluated one: `test` for results, `validation` to choose learning rates.
        limit: Documents to evaluate, None for all.
        eval_batch_size: Documents per forward pass of the evaluation.
        seeds: Each method is trained once with each.
        train: Fields of TRL's `SFTConfig`, for all methods.
    """

    model: str
    task: str
    methods: tuple[Method, ...]
    dtype: str = "float32"
    split: str = "test"
    limit: int | None = None
    eval_batch_size: int = 64
    seeds: tuple[int, ...] = (0,)
    train: dict[str, Any] = field(default_factory=dict)

    def cells(self, model_label: str, source: str = "") -> list[Cell]:
        """All cells, in the order of the file. `model_label` says which weights they are, `source` where."""
        return [
            Cell(
                name=method.name,
                model=model_label,
                dtype=self.dtype,
                task=self.task,
                split=self.split,
                limit=self.limit,
                eval_batch_size=self.eval_batch_size,
                config=method.config,
                learning_rate=rate,
                seed=seed if method.config else 0,
                train={**self.train, **method.train} if method.config else {},
                source=source,
            )
            for method in self.methods
            for rate in method.learning_rates
            for seed in (self.seeds if method.config else self.seeds[:1])
        ]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as a string, for want of a dot. This one reads it as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_grid(path: str | Path, model: str | None = None) -> Grid:
    """Reads and checks a grid.

    Args:
        path: The YAML file.
        model: Overrides the file's.

    Raises:
        ValueError: For anything that cannot be run as written, naming the file, the key and a way out.
    """
    path = Path(path)
    try:
        raw = yaml.load(path.read_text(), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from error
    try:
        return _grid(raw, model)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _grid(raw: Any, model: str | None) -> Grid:
    if not isinstance(raw, dict):
        raise ValueError(f"a grid has the keys {[f.name for f in dataclasses.fields(Grid)]}, this is {raw!r}")
    if model is not None:
        raw = {**raw, "model": model}
    _check_keys("", raw, (f.name for f in dataclasses.fields(Grid)))
    for key in ("model", "task", "methods"):
        if not raw.get(key):
            raise ValueError(f"{key}: is missing")
    train = _train("train", raw.get("train", {}))
    grid = Grid(
        model=_typed("model", raw["model"], str),
        task=_typed("task", raw["task"], str),
        methods=tuple(_method(i, m) for i, m in enumerate(_typed("methods", raw["methods"], list))),
        dtype=_typed("dtype", raw.get("dtype", "float32"), str),
        split=_typed("split", raw.get("split", "test"), str),
        limit=None if raw.get("limit") is None else _positive("limit", raw["limit"]),
        eval_batch_size=_positive("eval_batch_size", raw.get("eval_batch_size", 64)),
        seeds=tuple(_typed("seeds", s, int) for s in _listed(raw.get("seeds", 0))),
        train=train,
    )
    for key, value, choices in (("dtype", grid.dtype, _DTYPES), ("split", grid.split, ("validation", "test"))):
        if value not in choices:
            raise ValueError(f"{key}: {value!r} is none of {choices}")
    _check_distinct(grid)
    return grid


def _method(index: int, raw: Any) -> Method:
    where = f"methods[{index}]"
    raw = dict(_typed(where, raw, dict))
    where = f"method {raw.get('name', index)!r}"
    name = _typed(f"{where}: name", raw.pop("name", None), str)
    type_name = _typed(f"{where}: peft_type", raw.pop("peft_type", None), str)
    if type_name == "base":
        _check_keys(where, raw, ())
        return Method(name, {}, (0.0,))
    known = {member.value: config for member, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if type_name not in (*known, FULL):
        raise ValueError(f"{where}: peft_type: unknown {type_name!r}{suggest(type_name, [*known, 'base', FULL])}")
    if "learning_rate" not in raw:
        raise ValueError(f"{where}: learning_rate: is missing")
    rates = tuple(_rate(f"{where}: learning_rate", r) for r in _listed(raw.pop("learning_rate")))
    train = _train(f"{where}: train", raw.pop("train", {}))
    if type_name == FULL:
        _check_keys(where, raw, (), extra=("name", "peft_type", "learning_rate", "train"))
        return Method(name, {"peft_type": FULL}, rates, train)
    fields = {f.name for f in dataclasses.fields(known[type_name]) if f.init} - {"peft_type"}
    _check_keys(where, raw, fields, extra=("name", "peft_type", "learning_rate", "train"))
    raw.setdefault("task_type", "CAUSAL_LM")
    try:
        known[type_name](**raw)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
    return Method(name, {"peft_type": type_name, **raw}, rates, train)


def _train(where: str, raw: Any) -> dict[str, Any]:
    raw = _typed(where, raw, dict)
    _check_keys(where, raw, {f.name for f in dataclasses.fields(SFTConfig) if f.init} - _OURS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers deprecates fields that TRL fills in
            SFTConfig(output_dir="unused", report_to="none", use_cpu=not torch.cuda.is_available(), **raw)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
    return raw


def _rate(where: str, value: Any) -> float:
    try:
        rate = float(value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {value!r} is no number") from error
    if not 0 < rate < float("inf"):
        raise ValueError(f"{where}: {rate} is not above 0 and finite")
    return rate


def _positive(where: str, value: Any) -> int:
    if _typed(where, value, int) < 1:
        raise ValueError(f"{where}: {value} is below 1")
    return value


def _typed(where: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value


def _listed(value: Any) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError("a list of learning rates or seeds is empty")
    return values


def _check_keys(where: str, raw: dict, allowed: Iterable[str], extra: tuple[str, ...] = ()) -> None:
    allowed = [*allowed, *extra]
    for key in raw:
        if key not in allowed:
            prefix = f"{where}: " if where else ""
            reason = "is set by the bench itself" if key in _OURS and where.endswith("train") else "unknown key"
            raise ValueError(f"{prefix}{key}: {reason}{suggest(str(key), allowed)}")


def _check_distinct(grid: Grid) -> None:
    names = [method.name for method in grid.methods]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"methods: the names {sorted(twice)} occur twice")
    seen: dict[str, str] = {}
    for cell in grid.cells(grid.model):
        if cell.key in seen:
            raise ValueError(f"methods {seen[cell.key]!r} and {cell.name!r} define the same run; remove one")
        seen[cell.key] = cell.name
