"""Turns a fine-tuned model, or any adapter, into a linear post-block steering adapter of its base.

    peft-steer distill --base MODEL --tuned MODEL_OR_ADAPTER --task listops_short -o DIR
    peft-steer distill --base MODEL --tuned MODEL_OR_ADAPTER --task listops_short -o DIR --max-error 0.3
    peft-steer distill --base MODEL --tuned MODEL_OR_ADAPTER --task listops_short -o DIR --train-steps 100 --evaluate

Each block's edit is fitted in closed form on the stream that the edits before it have steered; --train-steps goes on
from there by the KL divergence to the tuned model. --max-error chooses each block's rank: what may be left, on
held-out text, of the distance between base and tuned model at the block's output. The result is an ordinary adapter.
"""

import argparse
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import AutoConfig

from lm_eval_tasks.model import PeftSteerLM
from peft_steer import SteerConfig
from peft_steer.cost.methods import share
from peft_steer.scoring import score
from peft_steer.tasks import load_task

from .command import run_module
from .distance import Distance
from .fitting import FittedBlock, fit_blocks, load_fit, save_fit
from .output import facts_of, write
from .pairs import Pair, PairSource, add_pair_arguments, find_pair
from .texts import Texts, add_text_arguments, load_texts
from .training import train_by_kl


logger = logging.getLogger(__name__)

_UNFINISHED = "unfinished"  # the folder of what an interrupted run goes on from
_FIT = "fit.safetensors"
_NOT_SETTINGS = ("output", "evaluate", "limit")  # what may differ when it goes on


def main(argv: list[str]) -> int:
    """Runs `peft-steer distill`."""
    return run_module(__name__, "peft-steer distill", argv)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pair_arguments(parser)
    add_text_arguments(parser)
    parser.set_defaults(num_texts=2048)
    add = parser.add_argument_group("adapter").add_argument
    add("--output", "-o", type=Path, required=True, metavar="DIR", help="the adapter, and distill.json")
    add("--r", type=int, default=8, help="rank of every block (default: 8)")
    add("--max_error", type=float, metavar="E", help="instead of --r: choose ranks so that no more is left")
    add("--ridge", type=float, default=0.0, help="of the regression, relative to the moments' diagonal (default: 0)")
    add = parser.add_argument_group("training").add_argument
    add("--train_steps", type=int, default=0, help="steps by KL after the fit (default: 0)")
    add("--learning_rate", type=float, default=2e-4, help="of these steps (default: 2e-4)")
    add(
        "--from_scratch",
        type=float,
        nargs="?",
        const=2e-3,
        metavar="RATE",
        help="train the same adapter from zero, as long as all this took, at this learning rate (default: 2e-3, the "
        "best for linear edits in recipes/bench/quickstart_rates.yaml)",
    )
    add = parser.add_argument_group("evaluation").add_argument
    add("--evaluate", action="store_true", help="score base, tuned model and adapter on --task")
    add("--limit", type=int, help="documents to score them on (default: all)")


def run(args: argparse.Namespace) -> None:
    _check(args)
    source = find_pair(args)
    _check_against(args, source)
    earlier = _earlier_fit(args)
    texts, held_out = load_texts(args, source.tokenizer)
    pair = source.load()
    results, models = distill(pair, texts, held_out, args, earlier)
    results |= facts_of(args) | {"tokens": texts.num_tokens}
    adapter = models["distilled"]
    adapter.peft_config["default"].base_model_name_or_path = source.base if Path(args.base).exists() else args.base
    adapter.save_pretrained(args.output)
    pair.tokenizer.save_pretrained(args.output)
    _write(args, results)
    if args.evaluate:
        task, _ = load_task(args.task, args.include_path, args.num_fewshot)
        for name, model in models.items():
            harness = PeftSteerLM(pretrained=model, tokenizer=pair.tokenizer, batch_size=args.batch_size)
            found = score(harness, task, args.limit)
            results["models"][name] |= {found["metric"]: found["score"], "stderr": found["stderr"], "n": found["n"]}
            _write(args, results)
    shutil.rmtree(args.output / _UNFINISHED)
    print(pd.DataFrame(results["models"]).T.to_markdown(floatfmt=".4g"))
    ranks = [block["r"] for block in results["blocks"]]
    print(f"\n{len(ranks)} blocks of rank {min(ranks)} to {max(ranks)}, saved to {args.output}. To score it:")
    model_args = f"pretrained={source.base},dtype={args.dtype},peft={args.output}"
    print(f"  peft-steer lm-eval --model peft-steer --model_args {model_args} --tasks {args.task or 'TASK'}")


def distill(
    pair: Pair,
    texts: Texts,
    held_out: Texts,
    args: argparse.Namespace,
    earlier: tuple[list[FittedBlock], float] | None,
) -> tuple[dict[str, Any], dict[str, nn.Module]]:
    """Fits, trains and measures, as the flags say.

    Args:
        earlier: The fit of an interrupted run, and the seconds it took.

    Returns:
        What to write to `distill.json`, and the models in it: `"base"`, `"tuned"`, `"distilled"` (a PEFT model) and,
        with `args.train_steps`, `"fitted"` (before the training), with `args.from_scratch`, `"from scratch"`.
    """
    folder = args.output / _UNFINISHED
    blocks, fit_seconds = earlier or _fit(pair, texts, held_out, args)
    models: dict[str, nn.Module] = {"base": pair.base, "tuned": pair.tuned}
    if args.train_steps:
        models["fitted"] = adapter_of(pair, blocks)
    models["distilled"] = adapter_of(pair, blocks)
    seconds, steps = {"fitted": fit_seconds, "distilled": fit_seconds}, {"distilled": args.train_steps}
    how = {"teacher": pair.tuned, "texts": texts, "seed": args.seed}
    if args.train_steps:
        at = {"learning_rate": args.learning_rate, "folder": folder / "training", "steps": args.train_steps}
        seconds["distilled"] += train_by_kl(models["distilled"], **how, **at)[1]
    if args.from_scratch:
        models["from scratch"] = adapter_of(pair, blocks, empty=True)
        at = {"learning_rate": args.from_scratch, "folder": folder / "scratch", "seconds": seconds["distilled"]}
        steps["from scratch"], seconds["from scratch"] = train_by_kl(models["from scratch"], **how, **at)
    facts = {
        name: {
            "parameters": _size(model),
            "seconds": seconds.get(name),
            "steps": steps.get(name),
            **distance.summary(),
        }
        for (name, model), distance in zip(models.items(), distances(pair, models, held_out), strict=True)
    }
    rows = [{"name": b.name, "r": b.r, "error": b.error, "error_held_out": b.error_held_out} for b in blocks]
    return {"models": facts, "blocks": rows}, models


def _fit(pair: Pair, texts: Texts, held_out: Texts, args: argparse.Namespace) -> tuple[list[FittedBlock], float]:
    """The fit, which is kept in case of an interruption, and the seconds it took."""
    start = time.perf_counter()
    blocks = fit_blocks(pair, texts, held_out, args.r, args.max_error, args.ridge)
    seconds = time.perf_counter() - start
    save_fit(args.output / _UNFINISHED / _FIT, blocks, {"settings": _settings(args), "seconds": seconds})
    return blocks, seconds


def _earlier_fit(args: argparse.Namespace) -> tuple[list[FittedBlock], float] | None:
    """What [`_fit`] kept in a run with the same settings that was interrupted."""
    path = args.output / _UNFINISHED / _FIT
    if not path.is_file():
        return None
    blocks, facts = load_fit(path)
    if facts["settings"] != _settings(args):
        raise ValueError(
            f"--output: {path.parent} is of another run, with {facts['settings']}; give the same flags to go on with "
            "it, delete it, or choose another directory"
        )
    logger.info("%s: a run that was interrupted goes on after its fit", path)
    return blocks, facts["seconds"]


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name not in _NOT_SETTINGS}


def adapter_of(pair: Pair, blocks: list[FittedBlock], empty: bool = False) -> PeftModel:
    """The base, whose weights it shares, with these edits as a steering adapter; `empty` leaves them at `dh = 0`."""
    r = max(block.r for block in blocks)
    config = SteerConfig(
        site="block",
        kind="linear",
        use_bias=True,
        r=r,
        rank_pattern={block.name: block.r for block in blocks if block.r != r},
        target_modules=[block.name for block in blocks],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(share(pair.base), config)
    if not empty:
        weights = {
            f"base_model.model.{block.name}.steering.steer_edit.{name}": getattr(block.edit, name).float()
            for block in blocks
            for name in ("W_down", "W_up", "b")
        }
        set_peft_model_state_dict(model, weights)
    return model.eval()


@torch.no_grad()
def distances(pair: Pair, models: dict[str, nn.Module], texts: Texts) -> list[Distance]:
    """Each model's distance from the tuned one."""
    found = [Distance() for _ in models]
    for batch in texts.batches("Measuring"):
        reference = pair.tuned(**batch.inputs(pair.tuned)).logits
        for distance, model in zip(found, models.values(), strict=True):
            distance.add(batch, reference, model(**batch.inputs(model)).logits)
    return found


def _write(args: argparse.Namespace, results: dict[str, Any]) -> None:
    write(args.output / "distill.json", lambda path: path.write_text(json.dumps(results, indent=1)))


def _size(model: nn.Module) -> int:
    """Parameters of an adapter, or of a whole model."""
    tensors = get_peft_model_state_dict(model).values() if isinstance(model, PeftModel) else model.parameters()
    return sum(tensor.numel() for tensor in tensors)


def _check(args: argparse.Namespace) -> None:
    for name, value, ok, needs in (
        ("r", args.r, args.r >= 1, "be at least 1"),
        ("max_error", args.max_error, args.max_error is None or args.max_error > 0, "be positive"),
        ("ridge", args.ridge, args.ridge >= 0, "be at least 0"),
        ("train_steps", args.train_steps, args.train_steps >= 0, "be at least 0"),
        ("learning_rate", args.learning_rate, args.learning_rate > 0, "be positive"),
        ("from_scratch", args.from_scratch, args.from_scratch is None or args.from_scratch > 0, "be positive"),
        (
            "limit",
            args.limit,
            args.limit is None or (args.evaluate and args.limit >= 1),
            "be at least 1, with --evaluate",
        ),
        ("evaluate", True, not args.evaluate or args.task is not None, "have a --task to score on"),
    ):
        if not ok:
            raise ValueError(f"--{name} is {value}, it must {needs}")


def _check_against(args: argparse.Namespace, source: PairSource) -> None:
    width = AutoConfig.from_pretrained(source.base).get_text_config().hidden_size
    if args.r > width:
        raise ValueError(f"--r is {args.r}, more than the hidden size {width}")
    if source.is_adapter:
        config = PeftConfig.from_pretrained(source.tuned)
        positions = getattr(config, "positions", getattr(config, "steer_positions", "all"))
        if positions != "all":
            raise ValueError(f"--tuned: an adapter with positions={positions!r} is none that edits every token alike")
