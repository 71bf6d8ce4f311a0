"""What `peft-steer export` does: loads, writes, compares, and only then gives what it wrote its name."""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from peft_steer import JointSteerLoraModel, SteerModel
from peft_steer.serving.words import describe_vectors
from peft_steer.utils.errors import UsageError, usage_errors
from peft_steer.utils.hub import find_model

from .check import acting, compare, log_probs, without_adapter
from .edits import check_config
from .gguf_vector import check_vector, export_gguf_vector, how_to_run, read_control_vector
from .lora import CONTROL_VECTOR, check_lora, export_lora
from .merged import export_merged


_CHECKS = {"gguf-vector": check_vector, "lora": check_lora, "merged": check_config}


def export(args: argparse.Namespace) -> None:
    """Runs the command; see `peft_steer/commands/export.py` for the arguments.

    Raises:
        UsageError: If the adapter cannot be exported.
        ValueError: If what was written differs from it.
    """
    with usage_errors():
        config = PeftConfig.from_pretrained(args.adapter)
    name = args.base or config.base_model_name_or_path
    if not name:
        raise UsageError("--base: the adapter does not name its base model")
    if config.task_type not in (None, "CAUSAL_LM"):
        raise UsageError(f"the adapter has task_type={config.task_type!r}, and engines serve language models")
    with usage_errors():
        _CHECKS[args.format](config)
        base = find_model(name).path
    with usage_errors(f"--base: {name!r} cannot be loaded: "):
        AutoConfig.from_pretrained(base)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent, prefix=f".{args.output.name}.") as folder:
        partial = Path(folder) / args.output.name
        {"gguf-vector": _vector, "lora": _lora, "merged": _merged}[args.format](args, config, base, partial)
        shutil.move(partial, args.output)
    print(f"Written to {args.output}.")
    if args.format == "gguf-vector":
        print(how_to_run(args.output))


def load(args: argparse.Namespace, base: str, weights: bool = True) -> PeftModel:
    """The adapter on its base; without `weights`, on one that has shapes alone."""
    with usage_errors():
        if weights:
            model = AutoModelForCausalLM.from_pretrained(base, dtype=args.dtype)
        else:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        adapted = PeftModel.from_pretrained(model, args.adapter, low_cpu_mem_usage=not weights).eval()
    if args.scale is not None:
        if not isinstance(adapted.base_model, (SteerModel, JointSteerLoraModel)):
            raise UsageError(f"--scale: {args.adapter} is not a steering adapter")
        adapted.base_model.set_scale("default", args.scale)
    return adapted


def _vector(args: argparse.Namespace, config: PeftConfig, base: str, path: Path) -> None:
    at_mlp = "mlp" in getattr(config, "sites", ())  # whether that is the block's output is tried with the weights
    model = load(args, base, weights=at_mlp)
    with usage_errors():  # what llama.cpp cannot run
        vectors = export_gguf_vector(model, path, drop_block_0=args.drop_block_0, architecture=args.architecture)
    print(f"Control vector of {describe_vectors(vectors)}. Read back: equal.")


def _lora(args: argparse.Namespace, config: PeftConfig, base: str, folder: Path) -> None:
    model = load(args, base)
    expected, plain = log_probs(model), without_adapter(model)
    with usage_errors():  # what is not a LoRA
        export_lora(model, folder, constants=args.constants, drop_block_0=args.drop_block_0)
    lora = PeftModel.from_pretrained(model.unload(), folder).eval()
    file = folder / CONTROL_VECTOR
    vectors = read_control_vector(file) if file.is_file() else {}
    with acting(vectors, lora.get_base_model()):
        comparison = compare(lora, expected, plain)
    print(f"Loaded by PEFT{f' with {CONTROL_VECTOR}' if vectors else ''}: {comparison}.")
    if args.constants == "drop":
        print("The constants are left out: this is another model than the adapter, and nothing says how good it is.")
    elif args.drop_block_0:
        print("Without block 0's constant this is another model than the adapter.")
    else:
        comparison.check()
    rank = cast(LoraConfig, lora.peft_config["default"]).r
    print(
        f"Rank {rank}; vLLM needs --max-lora-rank {rank} or more. The file holds products with the base's weights as "
        "they were loaded here, so an engine that serves a quantized base is not exact."
    )
    if vectors:
        print("In llama.cpp serve both:")
        print(f"python convert_lora_to_gguf.py {args.output} --base BASE_FOLDER --outtype f32 --outfile lora.gguf")
        print(how_to_run(args.output / CONTROL_VECTOR, "--lora lora.gguf "))


def _merged(args: argparse.Namespace, config: PeftConfig, base: str, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load(args, base)
    expected, plain = log_probs(model), without_adapter(model)
    with usage_errors():  # what does not merge
        export_merged(model, folder)
    del model
    tokenizer.save_pretrained(folder)
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype).eval()
    comparison = compare(loaded, expected, plain)
    print(f"Loaded by transformers: {comparison}.")
    comparison.check()
