"""Measures what PEFT methods cost on a model, side by side.

    peft-steer cost --model HuggingFaceTB/SmolLM2-135M-Instruct
    peft-steer cost --model DIR --method post_block --method LORA:r=16,target_modules=[q_proj,v_proj]
    peft-steer cost --model recipes/cost/llama_8x1024 --random_weights

"kept": bytes that a training forward keeps for backward. "floor": the same frozen model with a gradient down to block
0's output, which any method that trains something in block 0 has to pay for. "kernels": how many more than the base's
a block of a one-token forward pass runs, exact on every machine. "decode": cached greedy generation, compared with the
base. Times are medians (and quartiles) of ratios within a round; a round runs every method once, in random order.
"""

import argparse
import contextlib
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from peft_steer.utils.devices import default_device, device_name
from peft_steer.utils.errors import UsageError, usage_errors
from peft_steer.utils.files import write_json
from peft_steer.utils.hub import find_model

from ..cost import measure
from .allocator import saved_bytes
from .kernels import kernels_of_a_token
from .methods import FLOOR, PRESETS, adapt, adapter_bytes, parse_method, share
from .report import CHECKPOINTING, report


def run(args: argparse.Namespace) -> None:
    """Measures and prints the table.

    Raises:
        UsageError: If the model or a method cannot be measured as asked.
    """
    methods = list(dict.fromkeys(["lora", *(args.method or PRESETS)]))
    transformers.logging.set_verbosity_error()
    # PEFT still uses names that transformers has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    for method in methods:
        parse_method(method)
    results = _measure(args, methods)
    print(report(results))
    if args.output:
        write_json(args.output, results)


def _measure(args: argparse.Namespace, methods: list[str]) -> dict[str, Any]:
    source = find_model(args.model)
    rows: dict[str, dict[str, Any]] = {
        name: {"saved_bytes": {}, "kernels": {}} for name in ("base", "floor", *methods)
    }
    for dtype in args.dtype:
        _measure_dtype(rows, _load(source.path, args, dtype), args, dtype)
    return {
        "model": source.label + (" (random weights)" if args.random_weights else ""),
        "settings": {k: v for k, v in vars(args).items() if k not in ("model", "method", "output")},
        "environment": _environment(),
        "base": rows.pop("base"),
        "methods": rows,
    }


def _measure_dtype(
    rows: dict[str, dict[str, Any]], base: PreTrainedModel, args: argparse.Namespace, dtype: str
) -> None:
    models = {name: adapt(base, FLOOR if name == "floor" else name) for name in rows if name != "base"}
    torch.manual_seed(args.seed)
    ids = torch.randint(base.config.get_text_config().vocab_size, (args.batch_size, args.length), device=base.device)
    batch: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.clone(),
        "use_cache": False,
    }
    plain, blocks = kernels_of_a_token(share(base)), base.config.get_text_config().num_hidden_layers
    for name, model in tqdm(models.items(), desc=f"Bytes, {dtype}", leave=False):
        rows[name]["kernels"][dtype] = (kernels_of_a_token(model) - plain) / blocks
        for enabled, suffix in CHECKPOINTING.items():
            with measure.checkpointing(model, enabled):
                rows[name]["saved_bytes"][dtype + suffix] = saved_bytes(model, batch)
        if dtype == args.dtype[0]:
            rows[name] |= _once(model, batch, args.gradient_checkpointing)
    if dtype != args.dtype[0]:
        return
    timing = {"rounds": args.rounds, "device": base.device, "seed": args.seed}
    decoded = {name: share(base) if name == "base" else models[name] for name in rows if name != "floor"}
    decoders = {name: measure.greedy_decoding(model, ids[:1, :8], args.new_tokens) for name, model in decoded.items()}
    for name, seconds in measure.interleaved_seconds(decoders, label="Decoding", **timing).items():
        rows[name]["decode_seconds"] = seconds
    with contextlib.ExitStack() as stack:
        for model in models.values():
            stack.enter_context(measure.checkpointing(model, args.gradient_checkpointing))
        steps = {name: measure.training_step(model, batch) for name, model in models.items()}
        for name, seconds in measure.interleaved_seconds(steps, label="Steps", **timing).items():
            rows[name]["step_seconds"] = seconds


def _load(path: str, args: argparse.Namespace, dtype: str) -> PreTrainedModel:
    with usage_errors(f"--model: {args.model!r} cannot be loaded: "):
        config = AutoConfig.from_pretrained(path)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)  # not every architecture has a limit
    if longest is not None and max(args.length, 8 + args.new_tokens) > longest:
        raise UsageError(f"--length or 8 + --new_tokens exceeds the {longest} positions of {path}")
    if args.random_weights:
        torch.manual_seed(args.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    else:
        with usage_errors(f"--model: {args.model!r} cannot be loaded: "):
            model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    return model.to(default_device())


def _once(model: peft.PeftModel, batch: dict[str, Any], gradient_checkpointing: bool) -> dict[str, int]:
    trainable, parameters = model.get_nb_trainable_parameters()
    with measure.checkpointing(model, gradient_checkpointing):
        peak = measure.step_peak(model, batch)
    with tempfile.TemporaryDirectory() as directory:
        file_bytes = adapter_bytes(model, Path(directory))
    return {"trainable": trainable, "parameters": parameters, "file_bytes": file_bytes, "peak_bytes": peak}


def _environment() -> dict[str, str]:
    return {
        "device": device_name(default_device()),
        **{library.__name__: library.__version__ for library in (torch, transformers, peft)},
    }
