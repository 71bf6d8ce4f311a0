"""What `peft-steer extract` does: reads the pairs, sets the vectors, reports on held-out pairs, chooses a strength."""

import argparse
import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from lm_eval.api.task import ConfigurableTask
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from peft_steer import SteerConfig
from peft_steer.evaluation.splits import complete_splits
from peft_steer.evaluation.tasks import evaluate_on, load_task
from peft_steer.utils.errors import usage_errors
from peft_steer.utils.hub import find_model

from .directions import direction, with_norm
from .effect import Effect, best, effects
from .pairs import COLUMNS, Pair, load_questions, load_rows, pair_of, pair_of_systems
from .report import BlockReport, report
from .start import collect_pairs, set_vector, vector_places


SCALES = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
_FEWEST = 4


def extract(args: argparse.Namespace) -> None:
    """Runs the command; see `peft_steer/commands/extract.py` for the arguments.

    Raises:
        UsageError: If the arguments cannot be used as given.
    """
    with usage_errors():
        task = _task(args)
        source = find_model(args.model)
    with usage_errors(f"--model: {args.model!r} cannot be loaded: "):
        AutoConfig.from_pretrained(source.path)
    with usage_errors():
        tokenizer = AutoTokenizer.from_pretrained(source.path)
        used, held_out = _pairs(args, tokenizer)
        model = _model(args, source.path)
    blocks = _set_vectors(model, used, held_out, args)
    print(_table(blocks))
    measured = []
    if args.scales or task or any(pair.has_prompt for pair in held_out):
        measured = effects(model, args.scales or SCALES, held_out, tokenizer, task, args.limit, args.batch_size)
        print(f"\n{_effect_table(measured)}")
    scale = args.scale
    if task:
        chosen = best(measured, task.higher_is_better()[_metric(task)])
        scale = chosen.scale
        print(f"\nStrength {scale:g}: the best {_metric(task)} on {args.task}'s validation split.")
        if scale == 0:
            print(
                "No strength was better than none: the vector does not help here, and with strength 0 it does nothing."
            )
    config = cast(SteerConfig, model.peft_config["default"])
    config.scale = scale
    config.base_model_name_or_path = args.model
    model.save_pretrained(args.output, save_embedding_layers=False)
    tokenizer.save_pretrained(args.output)
    facts = {
        "arguments": {key: str(x) if isinstance(x, Path) else x for key, x in vars(args).items()},
        "pairs": {"used": len(used), "held_out": len(held_out)},
        "scale": scale,
        "blocks": [asdict(block) for block in blocks],
        "effects": [asdict(effect) for effect in measured],
    }
    (args.output / "extract.json").write_text(json.dumps(facts, indent=1))
    print(f"\nSaved to {args.output}, with strength {scale:g}.")


def _task(args: argparse.Namespace) -> ConfigurableTask | None:
    if args.task is None:
        return None
    task, _ = load_task(args.task, args.include_path, args.num_fewshot)
    if said := complete_splits(task):
        print(said)
    evaluate_on(task, "validation")
    return task


def _metric(task: ConfigurableTask) -> str:
    return next(iter(task.higher_is_better()))


def _pairs(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Pair], list[Pair]]:
    """The pairs that the vectors are made of, and those that are held out."""
    if args.pairs:
        columns = (args.positive_column, args.negative_column)
        rows = load_rows(args.pairs, args.split, columns)
        pairs = [
            pair_of({**row, **{new: row[old] for new, old in zip(COLUMNS, columns, strict=True)}}, tokenizer)
            for row in rows
        ]
    else:
        systems = (args.positive_system, args.negative_system)
        pairs = [pair_of_systems(question, systems, tokenizer) for question in load_questions(args.questions)]
    random.Random(args.seed).shuffle(pairs)
    count = round(args.held_out * len(pairs))
    if len(pairs) - count < _FEWEST or 0 < count < _FEWEST:
        raise ValueError(
            f"--held-out {args.held_out:g}: of {len(pairs)} pairs {count} would be held out, and both parts need "
            f"{_FEWEST}; give more pairs, or --held-out 0 for no report"
        )
    return pairs[count:], pairs[:count]


def _model(args: argparse.Namespace, path: str) -> PeftModel:
    quantized: dict[str, Any] = {}
    if args.load_in_4bit or args.load_in_8bit:
        quantized["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=args.load_in_4bit, load_in_8bit=args.load_in_8bit, bnb_4bit_quant_type="nf4"
        )
    base: Any = AutoModelForCausalLM.from_pretrained(path, dtype=args.dtype, **quantized)
    if torch.cuda.is_available() and not quantized:
        base = base.to("cuda")
    config = SteerConfig(kind="vector", site=args.site, layers_to_transform=args.layers, task_type="CAUSAL_LM")
    return get_peft_model(base, config).eval()


def _set_vectors(
    model: PeftModel, used: list[Pair], held_out: list[Pair], args: argparse.Namespace
) -> list[BlockReport]:
    places, pairs = vector_places(model), [*used, *held_out]
    sides = [pair.positive for pair in pairs], [pair.negative for pair in pairs]
    states = collect_pairs(model, *sides, places, args.tokens, args.batch_size)
    blocks = []
    for name, (positive, negative) in states.items():
        (p, p_out), (n, n_out) = (x.split([len(used), len(held_out)]) for x in (positive, negative))
        with usage_errors(f"block {places[name][0].index}: "):
            v = with_norm(direction(p, n, args.method), args.norm, torch.cat([p, n]))
        set_vector(model, name, v)
        blocks.append(report(places[name][0].index, v, p, n, (p_out, n_out), args.seed))
    return blocks


def _table(blocks: list[BlockReport]) -> str:
    rows = []
    for b in blocks:
        row = {"block": b.block, "|v|": f"{b.norm:.3g}", "|v| / |h|": f"{b.norm / b.states_norm:.3f}"}
        if b.auc is not None:
            row["AUC (95 %)"] = f"{b.auc:.3f} ({b.auc_low:.3f} to {b.auc_high:.3f})"
            row["pairs right (95 %)"] = f"{b.right} of {b.pairs} ({b.right_low:.2f} to {b.right_high:.2f})"
        rows.append(row)
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def _effect_table(measured: list[Effect]) -> str:
    def shown(x: float | None, stderr: float | None) -> str:
        return "–" if x is None else f"{x:.3f} ± {stderr:.3f}" if stderr is not None else f"{x:.3f}"

    rows = [
        {
            "strength": f"{e.scale:g}",
            "log-odds, nats ± s.e.": shown(e.log_odds, e.log_odds_stderr),
            "shift from 0 ± s.e.": shown(e.shift, e.shift_stderr),
            "KL to the base": shown(e.kl, None),
            "score ± s.e.": shown(e.score, e.stderr),
        }
        for e in measured
    ]
    table = pd.DataFrame(rows)
    return table.loc[:, (table != "–").any()].to_markdown(index=False, disable_numparse=True)
