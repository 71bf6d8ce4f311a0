"""Results and experiments in the format of PEFT's method comparison (`method_comparison/MetaMathQA` of its
repository).

What a cell did not measure is null, never a guess. What PEFT's format has no field for is under `peft_steer`.
"""

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import get_peft_config
from transformers import SchedulerType
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from peft_steer.utils.devices import has_accelerator

from .plan import FULL, STEER_RATE, Cell, peft_fields


_ADAMW = ("adamw_torch", "adamw_torch_fused")
_WARMUP = 0.1  # of all steps, what PEFT's cosine schedule has
_README = """\
`results/` has one file for every trained model, in the format of PEFT's method comparison. A null was not measured.

`experiments/` is for the MetaMathQA benchmark itself. Copy it to `method_comparison/MetaMathQA/` of PEFT's repository,
and start an experiment there with our methods registered:

    python -c "import runpy, sys, peft_steer; sys.argv = sys.argv[1:]; runpy.run_path('run.py', run_name='__main__')"
    \\
        run.py -v experiments/TYPE/NAME
"""


def export_peft(cells: Sequence[Cell], results: Sequence[dict[str, Any]], directory: Path) -> list[str]:
    """Writes `<task>/results/<type>--<name>.json` and `<task>/experiments/<type>/<name>/` for each trained test cell.

    Args:
        cells, results: In the same order. The untrained base, sweeps and failed cells have no place in the format.
        directory: Made if it is not there.

    Returns:
        A line for every cell of which no experiment was written, because PEFT's benchmark cannot be told to train it
        so.
    """
    remarks = []
    several_seeds = len({cell.seed for cell in cells if cell.config and cell.split == "test"}) > 1
    for cell, result in zip(cells, results, strict=True):
        if not cell.config or cell.split != "test" or result["status"] != "done":
            continue
        kind, name = _names(cell, several_seeds)
        if cell.trainer != "sft":
            remarks.append(f"{kind}/{name}: no result for PEFT's comparison, which trains by supervision alone")
            continue
        arguments = _arguments(cell)
        folder = directory / _slug(cell.task)
        if reason := _inexpressible(cell, arguments):
            remarks.append(f"{kind}/{name}: no experiment for PEFT's benchmark: {reason}")
        else:
            _write_experiment(cell, arguments, folder / "experiments" / kind / name)
        _write(folder / "results" / f"{kind}--{name}.json", _result(cell, result, arguments, f"{kind}/{name}"))
        (folder / "README.md").write_text(_README)
    return remarks


def _names(cell: Cell, several_seeds: bool) -> tuple[str, str]:
    kind = "full-finetuning" if cell.config["peft_type"] == FULL else cell.config["peft_type"].lower()
    model = cell.model.split(" ")[0].rstrip("/").split("/")[-1]  # the label of weights says more after a space
    parts = [model, cell.name, f"lr_{cell.learning_rate:g}", *([f"seed_{cell.seed}"] if several_seeds else [])]
    return kind, "-".join(_slug(part) for part in parts)


def _slug(text: str) -> str:
    return re.sub(r"[^\w.=+-]+", "-", text).strip("-")


def _arguments(cell: Cell) -> SFTConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers deprecates fields that TRL fills in
        arguments = {"bf16": False, **cell.train}
        return SFTConfig("unused", report_to="none", use_cpu=not has_accelerator(), **arguments)


def _dtype(cell: Cell) -> str:
    if cell.quantization.get("load_in_4bit"):
        return "int4"
    return "int8" if cell.quantization.get("load_in_8bit") else cell.dtype


def _batch_size(cell: Cell, arguments: SFTConfig) -> int:
    return arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * cell.processes


def _optimizer(arguments: SFTConfig) -> str:
    name = OptimizerNames(arguments.optim).value
    return "AdamW" if name in _ADAMW else name


def _scheduler(arguments: SFTConfig) -> str | None:
    name = SchedulerType(arguments.lr_scheduler_type).value
    return None if name == "constant" else name


def _inexpressible(cell: Cell, arguments: SFTConfig) -> str | None:
    """Why `training_params.json` cannot say what this cell did; None if it can."""
    if STEER_RATE in cell.config:
        return "its optimizer has one learning rate"
    scheduler, steps = _scheduler(arguments), arguments.max_steps
    if steps < 1:
        return f"its length is in steps: set max_steps (num_train_epochs is {arguments.num_train_epochs:g})"
    if scheduler not in ("cosine", None):
        return f"its lr_scheduler_type is cosine or constant, not {scheduler!r}"
    warmup = int(_WARMUP * steps) if scheduler == "cosine" else 0
    if arguments.get_warmup_steps(steps) != warmup:
        return f"its warm-up is {warmup} of {steps} steps, not {arguments.get_warmup_steps(steps)}: set warmup_steps"
    if OptimizerNames(arguments.optim).value not in _ADAMW:
        return f"optim: {OptimizerNames(arguments.optim).value!r} is not one of {_ADAMW}"
    if extra := sorted(set(cell.quantization) - {"load_in_4bit", "load_in_8bit"}):
        return f"it quantizes with the defaults of BitsAndBytesConfig, without {', '.join(extra)}"
    return None


def _train_config(cell: Cell, arguments: SFTConfig) -> dict[str, Any]:
    return {
        "model_id": cell.model,
        "dtype": _dtype(cell),
        "max_seq_length": arguments.max_length,
        "batch_size": _batch_size(cell, arguments),
        "batch_size_eval": cell.eval_batch_size,
        "max_steps": arguments.max_steps,
        "eval_steps": None,
        "compile": arguments.torch_compile,
        "use_gc": arguments.gradient_checkpointing,
        "query_template": None,  # the task makes the prompts
        "seed": cell.seed,
        "grad_norm_clip": arguments.max_grad_norm,
        "optimizer_type": "AdamW"
        if OptimizerNames(arguments.optim).value in _ADAMW
        else OptimizerNames(arguments.optim).value,
        "optimizer_kwargs": {"lr": cell.learning_rate, "weight_decay": arguments.weight_decay},
        "lr_scheduler": _scheduler(arguments),
        "use_amp": bool(arguments.bf16 or arguments.fp16),
        "autocast_adapter_dtype": None,
        "generation_kwargs": None,
        "attn_implementation": None,
        "init_kv_cache_prefix": None,
    }


def _write_experiment(cell: Cell, arguments: SFTConfig, folder: Path) -> None:
    said = ("model_id", "dtype", "batch_size", "max_steps", "use_gc", "seed", "grad_norm_clip", "optimizer_kwargs")
    params = {key: value for key, value in _train_config(cell, arguments).items() if key in (*said, "lr_scheduler")}
    # The rest is the benchmark's own: lengths, prompts, generation. It refuses eval_steps above max_steps.
    params["eval_steps"] = min(250, arguments.max_steps)
    _write(folder / "training_params.json", params)
    if cell.config["peft_type"] != FULL:
        get_peft_config(peft_fields(cell.config)).save_pretrained(str(folder))


def _result(cell: Cell, result: dict[str, Any], arguments: SFTConfig, name: str) -> dict[str, Any]:
    environment, forgetting = result["environment"], result["forgetting"]
    full = cell.config["peft_type"] == FULL
    reserved = result.get("reserved_bytes") or dict.fromkeys(("mean", "max", "p99"))
    logged = [{"step": step, "train loss": loss} for step, loss in result["loss"]]
    final = {
        "step": result["loss"][-1][0] if result["loss"] else None,
        "test accuracy": result["score"],
        "train loss": result["loss"][-1][1] if result["loss"] else None,
        "train samples": result.get("train_samples"),
        "train total tokens": result["train_tokens"],
        "forgetting": forgetting["after"] - forgetting["before"] if forgetting else None,
    }
    ours = ("metric", "stderr", "n", "peak_bytes", "saved_bytes", "decode_ratio", "forgetting", "environment")
    return {
        "run_info": {
            "created_at": result.get("created_at"),
            "total_time": result.get("total_seconds"),
            "experiment_name": name,
            "peft_branch": None,
            "train_config": _train_config(cell, arguments),
            "peft_config": None if full else _plain(get_peft_config(peft_fields(cell.config)).to_dict()),
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": reserved["mean"],
            "accelerator_memory_max": reserved["max"],
            "accelerator_memory_reserved_99th": reserved["p99"],
            "train_time": result["train_seconds"],
            "file_size": result["adapter_bytes"],
            "num_trainable_params": result["trainable"],
            "num_total_params": result["parameters"],
            "status": "success",
            "metrics": [*logged, final],
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {},
            "package_info": {
                f"{library}-{what}": environment.get(library) if what == "version" else None
                for library in ("transformers", "peft", "datasets", "bitsandbytes", "torch")
                for what in ("version", "commit-hash")
            },
            "system_info": {
                **dict.fromkeys(("system", "release", "version", "machine", "processor")),
                "accelerator": environment["device"],
            },
            "pytorch_info": None,
        },
        "peft_steer": {"task": cell.task, "key": cell.key, **{key: result[key] for key in ours}},
    }


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
