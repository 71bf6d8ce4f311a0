"""Turns a fine-tuned model, or any adapter, into a linear post-block steering adapter of its base.

    peft-steer distill --base MODEL --tuned MODEL_OR_ADAPTER --task listops_short -o DIR
    peft-steer distill --base MODEL --tuned MODEL_OR_ADAPTER --task listops_short -o DIR --max-error 0.3
    peft-steer distill --base MODEL --tuned MODEL_OR_ADAPTER --task listops_short -o DIR --train-steps 100 --evaluate

Each block's edit is fitted in closed form on the stream that the edits before it have steered; --train-steps trains on
from there by the KL divergence to the tuned model. --max-error chooses each block's rank: the part of the distance
between base and tuned model that may be left at the block's output, on held-out text. The result is an ordinary
adapter.
"""

import argparse
import json
import logging
import shutil
import sys
import time
from pathlib import Path
from typing import Any, cast

import pandas as pd
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, set_seed

from peft_steer.evaluation.lm import PeftSteerLM
from peft_steer.evaluation.scoring import score
from peft_steer.evaluation.tasks import load_task
from peft_steer.utils.devices import visibility_variable, visible_accelerators
from peft_steer.utils.errors import UsageError
from peft_steer.utils.files import write_json

from ..command import run_module
from ..inputs.pairs import Model, Pair, PairSource, find_pair
from ..inputs.texts import Texts, load_texts
from ..output import check_same_run, facts_of, only_run
from .fitting import FittedBlock, fit_blocks, load_fit, save_fit
from .students import adapter_of, distances, out_of_reach, size_of
from .training import train_by_kl


logger = logging.getLogger(__name__)

_UNFINISHED = "unfinished"  # the folder that an interrupted run resumes from
_FIT = "fit.safetensors"
_NOTICEABLE = 1e-3  # nats


def main(args: argparse.Namespace) -> None:
    """Runs `peft-steer distill`.

    Raises:
        UsageError: If the models, the text or the flags cannot be used as given.
    """
    run_module(sys.modules[__name__], args)


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
            "--tuned changes what follows the blocks (its final norm or head), which no edit of a block's output can "
            "follow: a KL of about %.2g will be left",
            unreachable,
        )
    results, models = distill(pair, texts, held_out, args, earlier)
    results |= facts_of(args) | {"num_tokens": texts.num_tokens, "out_of_reach": unreachable}
    adapter = cast(PeftModel, models["distilled"])
    adapter.peft_config["default"].base_model_name_or_path = source.base if Path(args.base).exists() else args.base
    adapter.save_pretrained(args.output)
    pair.tokenizer.save_pretrained(args.output)
    if args.evaluate:
        _evaluate(args, pair, models, results)
    write_json(args.output / "distill.json", results)
    shutil.rmtree(args.output / _UNFINISHED)
    print(_table(results["models"]))
    ranks = [block["r"] for block in results["blocks"]]
    spread = f"{min(ranks)} to {max(ranks)}" if len(set(ranks)) > 1 else ranks[0]
    print(f"\n{len(ranks)} blocks of rank {spread}, saved to {args.output}. To score it:")
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
) -> tuple[dict[str, Any], dict[str, Model]]:
    """Fits, trains and measures, as the flags say.

    Args:
        earlier: The fit of an interrupted run, and the seconds it took.

    Returns:
        The contents of `distill.json`, and the models in it: `"base"`, `"tuned"`, `"distilled"` (a PEFT model) and,
        with `args.train_steps`, `"fitted"` (before the training), with `args.from_scratch`, `"from scratch"`.
    """
    folder = args.output / _UNFINISHED
    blocks, fit_seconds = earlier or _fit(pair, texts, held_out, args)
    models: dict[str, Model] = {"base": pair.base, "tuned": pair.tuned}
    if args.train_steps:
        models["fitted"] = adapter_of(pair, blocks)
    models["distilled"] = student = adapter_of(pair, blocks)
    seconds, steps = {"fitted": fit_seconds, "distilled": fit_seconds}, {"distilled": args.train_steps}
    common: dict[str, Any] = {"teacher": pair.tuned, "texts": texts, "seed": args.seed}
    if args.train_steps:
        rate = args.learning_rate or 2e-4
        seconds["distilled"] += train_by_kl(
            student, **common, learning_rate=rate, folder=folder / "training", steps=args.train_steps
        )[1]
    if args.from_scratch:
        set_seed(args.seed)
        models["from scratch"] = scratch = adapter_of(pair, blocks, empty=True)
        steps["from scratch"], seconds["from scratch"] = train_by_kl(
            scratch,
            **common,
            learning_rate=args.from_scratch,
            folder=folder / "scratch",
            seconds=seconds["distilled"],
        )
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
    """The fit, which is saved in case of an interruption, and the seconds that it took."""
    start = time.perf_counter()
    blocks = fit_blocks(pair, texts, held_out, args.r, args.max_error, args.ridge)
    seconds = time.perf_counter() - start
    save_fit(args.output / _UNFINISHED / _FIT, blocks, {"settings": _settings(args), "seconds": seconds})
    return blocks, seconds


def _evaluate(args: argparse.Namespace, pair: Pair, models: dict[str, Model], results: dict[str, Any]) -> None:
    """Adds each model's score on the task to its results; those of an interrupted run are not repeated."""
    path = args.output / _UNFINISHED / f"scores-{args.limit}.json"
    scores = json.loads(path.read_text()) if path.is_file() else {}
    task, _ = load_task(args.task, args.include_path, args.num_fewshot)
    for name, model in models.items():
        if name not in scores:
            harness = PeftSteerLM(pretrained=model, tokenizer=pair.tokenizer, batch_size=args.batch_size)
            result = score(harness, task, args.limit)
            scores[name] = {result["metric"]: result["score"], "stderr": result["stderr"], "n": result["n"]}
            write_json(path, scores)
        results["models"][name] |= scores[name]


def _earlier_fit(args: argparse.Namespace) -> tuple[list[FittedBlock], float] | None:
    """The fit that an interrupted run with the same settings saved."""
    path = args.output / _UNFINISHED / _FIT
    if not path.is_file():
        return None
    blocks, facts = load_fit(path)
    check_same_run(path.parent, facts["settings"], _settings(args))
    logger.info("%s: an interrupted run is resumed after its fit", path)
    return blocks, facts["seconds"]


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in facts_of(args).items() if name not in ("evaluate", "limit")}


def _table(models: dict[str, dict[str, Any]]) -> str:
    table = pd.DataFrame.from_dict(models, orient="index").drop(columns=["tokens", "tokens_answer"])
    whole = {"parameters": "{:,.0f}", "seconds": "{:.0f}", "steps": "{:.0f}", "n": "{:.0f}"}
    for name in table:
        shown = whole.get(str(name), "{:.3g}")
        table[name] = ["–" if pd.isna(value) else shown.format(value) for value in table[name]]
    return table.to_markdown(disable_numparse=True, stralign="right")


def _check(args: argparse.Namespace) -> None:
    if (args.train_steps or args.from_scratch) and len(visible_accelerators()) > 1:
        raise UsageError(
            f"--train_steps, --from_scratch: {len(visible_accelerators())} accelerators are visible, and the training "
            f"uses one; set {visibility_variable()}={visible_accelerators()[0]}"
        )
    if args.learning_rate is not None and not args.train_steps:
        raise UsageError(f"--learning_rate is {args.learning_rate}, which needs --train_steps")
    if args.evaluate and args.task is None:
        raise UsageError("--evaluate needs a --task to score on")
    if args.limit is not None and not args.evaluate:
        raise UsageError(f"--limit is {args.limit}, which needs --evaluate")


def _check_against(args: argparse.Namespace, source: PairSource) -> None:
    width = AutoConfig.from_pretrained(source.base).get_text_config().hidden_size
    if args.r > width:
        raise UsageError(f"--r is {args.r}, more than the hidden size {width}")
    if source.is_adapter:
        config = PeftConfig.from_pretrained(source.tuned)
        positions = getattr(config, "positions", getattr(config, "steer_positions", "all"))
        if positions != "all":
            raise UsageError(
                f"--tuned: an adapter with positions={positions!r} does not edit every token alike, and a distilled "
                "one does; give an adapter with positions='all'"
            )
