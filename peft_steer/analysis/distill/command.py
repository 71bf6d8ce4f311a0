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
from peft import PeftConfig
from torch import nn
from transformers import AutoConfig, set_seed

from peft_steer.evaluation.lm import PeftSteerLM
from peft_steer.evaluation.scoring import score
from peft_steer.evaluation.tasks import load_task

from ..command import run_module
from ..inputs.pairs import Pair, PairSource, add_pair_arguments, find_pair
from ..inputs.texts import Texts, add_text_arguments, load_texts
from ..output import check_same_run, facts_of, only_run, write
from .fitting import FittedBlock, fit_blocks, load_fit, save_fit
from .students import adapter_of, distances, out_of_reach, size_of
from .training import train_by_kl


logger = logging.getLogger(__name__)

_UNFINISHED = "unfinished"  # the folder of what an interrupted run goes on from
_FIT = "fit.safetensors"
_NOTICEABLE = 1e-3  # nats


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
    add("--learning_rate", type=float, metavar="RATE", help="of these steps (default: 2e-4)")
    add(
        "--from_scratch",
        type=float,
        nargs="?",
        const=2e-3,
        metavar="RATE",
        help="train the same adapter from zero, as long as all this took, at this learning rate (default: 2e-3, the "
        "better of 2e-3 and 5e-3 for such edits in supervised training, recipes/bench/quickstart_rates.yaml)",
    )
    add = parser.add_argument_group("evaluation").add_argument
    add("--evaluate", action="store_true", help="score base, tuned model and adapter on --task")
    add("--limit", type=int, help="documents to score them on (default: all)")


def run(args: argparse.Namespace) -> None:
    _check(args)
    source = find_pair(args)
    _check_against(args, source)
    with only_run(args.output):
        _run(args, source)


def _run(args: argparse.Namespace, source: PairSource) -> None:
    earlier = _earlier_fit(args)
    texts, held_out = load_texts(args, source.tokenizer)
    pair = source.load()
    unreachable = out_of_reach(pair, held_out)
    if unreachable > _NOTICEABLE:
        logger.warning(
            "--tuned changes what follows the blocks, its final norm or head, and no edit of a block's output follows "
            "that: a KL of about %.2g will be left",
            unreachable,
        )
    results, models = distill(pair, texts, held_out, args, earlier)
    results |= facts_of(args) | {"num_tokens": texts.num_tokens, "out_of_reach": unreachable}
    adapter = models["distilled"]
    adapter.peft_config["default"].base_model_name_or_path = source.base if Path(args.base).exists() else args.base
    adapter.save_pretrained(args.output)
    pair.tokenizer.save_pretrained(args.output)
    if args.evaluate:
        _evaluate(args, pair, models, results)
    _write(args.output / "distill.json", results)
    shutil.rmtree(args.output / _UNFINISHED)
    print(_table(results["models"]))
    ranks = [block["r"] for block in results["blocks"]]
    print(f"\n{len(ranks)} blocks of rank {min(ranks)} to {max(ranks)}, saved to {args.output}. To score it:")
    quantized = [f"{flag}=True," for flag in ("load_in_4bit", "load_in_8bit") if getattr(args, flag)]
    model_args = f"pretrained={source.base},dtype={args.dtype},{''.join(quantized)}peft={args.output}"
    given = [
        f" --{name} {value}" for name in ("include_path", "num_fewshot") if (value := getattr(args, name)) is not None
    ]
    print(
        f"  peft-steer lm-eval --model peft-steer --model_args {model_args} --tasks {args.task or 'TASK'}",
        *given,
        sep="",
    )


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
        at = {"learning_rate": args.learning_rate or 2e-4, "folder": folder / "training", "steps": args.train_steps}
        seconds["distilled"] += train_by_kl(models["distilled"], **how, **at)[1]
    if args.from_scratch:
        set_seed(args.seed)
        models["from scratch"] = adapter_of(pair, blocks, empty=True)
        at = {"learning_rate": args.from_scratch, "folder": folder / "scratch", "seconds": seconds["distilled"]}
        steps["from scratch"], seconds["from scratch"] = train_by_kl(models["from scratch"], **how, **at)
    facts = {
        name: {
            "parameters": size_of(model),
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


def _evaluate(args: argparse.Namespace, pair: Pair, models: dict[str, nn.Module], results: dict[str, Any]) -> None:
    """Adds each model's score on the task to its results; those of an interrupted run are not repeated."""
    path = args.output / _UNFINISHED / f"scores-{args.limit}.json"
    scores = json.loads(path.read_text()) if path.is_file() else {}
    task, _ = load_task(args.task, args.include_path, args.num_fewshot)
    for name, model in models.items():
        if name not in scores:
            harness = PeftSteerLM(pretrained=model, tokenizer=pair.tokenizer, batch_size=args.batch_size)
            found = score(harness, task, args.limit)
            scores[name] = {found["metric"]: found["score"], "stderr": found["stderr"], "n": found["n"]}
            _write(path, scores)
        results["models"][name] |= scores[name]


def _earlier_fit(args: argparse.Namespace) -> tuple[list[FittedBlock], float] | None:
    """What [`_fit`] kept in a run with the same settings that was interrupted."""
    path = args.output / _UNFINISHED / _FIT
    if not path.is_file():
        return None
    blocks, facts = load_fit(path)
    check_same_run(path.parent, facts["settings"], _settings(args))
    logger.info("%s: a run that was interrupted goes on after its fit", path)
    return blocks, facts["seconds"]


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in facts_of(args).items() if name not in ("evaluate", "limit")}


def _table(models: dict[str, dict[str, Any]]) -> str:
    table = pd.DataFrame.from_dict(models, orient="index").drop(columns=["tokens", "tokens_answer"])
    whole = {"parameters": "{:,.0f}", "seconds": "{:.0f}", "steps": "{:.0f}", "n": "{:.0f}"}
    for name in table:
        shown = whole.get(name, "{:.3g}")
        table[name] = ["–" if pd.isna(value) else shown.format(value) for value in table[name]]
    return table.to_markdown(disable_numparse=True, stralign="right")


def _write(path: Path, results: dict[str, Any]) -> None:
    write(path, lambda partial: partial.write_text(json.dumps(results, indent=1)))


def _check(args: argparse.Namespace) -> None:
    if (args.train_steps or args.from_scratch) and torch.cuda.device_count() > 1:
        raise ValueError(
            f"--train_steps, --from_scratch: {torch.cuda.device_count()} GPUs are visible, and the training is for "
            "one; set CUDA_VISIBLE_DEVICES=0"
        )
    for name, value, ok, needs in (
        ("r", args.r, args.r >= 1, "be at least 1"),
        ("max_error", args.max_error, args.max_error is None or args.max_error > 0, "be positive"),
        ("ridge", args.ridge, args.ridge >= 0, "be at least 0"),
        ("train_steps", args.train_steps, args.train_steps >= 0, "be at least 0"),
        (
            "learning_rate",
            args.learning_rate,
            args.learning_rate is None or (args.train_steps and args.learning_rate > 0),
            "be positive, with --train_steps",
        ),
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
