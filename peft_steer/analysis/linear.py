"""How linear is what fine-tuning does? The best map of each rank from a block's output `h` to the oracle's `dh`.

    peft-steer analyze linear --base MODEL --tuned MODEL_OR_ADAPTER --task listops_short -o DIR
    peft-steer analyze linear ... --compare LOREFT_DIR POST_BLOCK_DIR

The maps are the paper's linearized oracle (arXiv 2603.00425): fitted in closed form to `dh = h_tuned - h_base` along
the tuned model's own stream, all blocks in one pass. The fit minimizes "error", `sqrt(E w |dh - fit|^2 / E w |dh|^2)`
at each block, where the weight `w = 1 / |h|^2` keeps the few tokens with enormous activations from counting more than
others. "kl" is that of the base steered by the maps at every block, on held-out text and along what the tuned model
generates. The moments take 32 d^2 bytes a block.

An adapter to compare with was not trained to be near this tuned model, and perhaps on the text that is held out here
(which is from the task's training split). To see how far apart two trainings for one task are anyway, also compare
with an adapter trained by the tuned model's own recipe with another seed.
"""

import argparse
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from transformers import AutoConfig

from peft_steer.utils.errors import UsageError

from .capture.generation import continuations
from .capture.steering import Place, edited, record
from .distill.students import size_of
from .inputs.adapters import check_adapter
from .inputs.pairs import Model, Pair, PairSource, find_pair
from .inputs.texts import Texts, load_texts
from .maths.distance import Distance
from .maths.regression import LowRankMap, PairMoments, RankedMaps, fit
from .output import facts_of, write_figure, write_table


BLOCK = ("block",)


def run(args: argparse.Namespace) -> None:
    source = find_pair(args)
    width = AutoConfig.from_pretrained(source.base).get_text_config().hidden_size
    if max(args.ranks) > width:
        raise UsageError(f"--ranks: {max(args.ranks)} is more than the hidden size {width}")
    for adapter in args.compare:
        check_adapter(source.base, args.base, adapter, "--compare")
    texts, held_out = load_texts(args, source.tokenizer)
    pair = source.load()
    maps, errors = fit_maps(pair, texts, held_out, args.ranks, args.ridge)
    facts = facts_of(args) | {"num_tokens": texts.num_tokens}
    facts["ridge"] = max(each.ridge for ranked in maps.values() for each in ranked.values())
    write_table(args.output, "linear_errors", errors, **facts)
    generated = continuations(pair.tuned, held_out, pair.tokenizer, args.new_tokens)
    rows = []
    for row in _rows(source, pair, maps, (held_out, generated), args):
        rows.append(row)
        models = pd.DataFrame(rows)
        write_table(args.output, "linear", models, **facts)
    write_figure(args.output, "linear", figure(models, errors))
    print(models.to_markdown(index=False, floatfmt=".3g"))


def _rows(
    source: PairSource,
    pair: Pair,
    maps: dict[str, dict[int, RankedMaps]],
    texts: tuple[Texts, Texts],
    args: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """The table, row by row: the base, the base steered by each map, the compared adapters."""
    yield {"model": "base", "r": None, "parameters": 0, **_measured(pair, *texts)}
    for kind, ranked in maps.items():
        for r in args.ranks:
            steering = {index: each.of_rank(r) for index, each in ranked.items()}
            size = sum(tensor.numel() for each in steering.values() for tensor in (each.W_down, each.W_up))
            size += sum(each.b.numel() for each in steering.values()) if kind == "affine" else 0
            yield {"model": f"{kind} map", "r": r, "parameters": size, **_measured(pair, *texts, steering)}
    for adapter in args.compare:
        model = source.load_adapter(adapter)
        yield {"model": adapter, "r": None, "parameters": size_of(model), **_measured(pair, *texts, model=model)}


@torch.no_grad()
def fit_maps(
    pair: Pair, texts: Texts, held_out: Texts, ranks: list[int], ridge: float = 0.0
) -> tuple[dict[str, dict[int, RankedMaps]], pd.DataFrame]:
    """Fits the best maps of every block that fine-tuning changes.

    Returns:
        Of each kind, `"linear"` and `"affine"`, the maps by the block's index; and a table of their errors at `ranks`.

    Raises:
        UsageError: If the tuned model does what the base does.
    """
    moments, unseen = (_moments(pair, text) for text in (texts, held_out))
    maps: dict[str, dict[int, RankedMaps]] = {"linear": {}, "affine": {}}
    rows = []
    for index in sorted(moments):
        both = moments.pop(index), unseen.pop(index)  # (their memory is freed block by block)
        if not both[0].yy:
            continue
        for kind, ranked in maps.items():
            fitted_maps = fit(both[0], kind == "affine", ridge, f"block {index}")
            seen, new = ((fitted_maps.residuals(each) / (each.yy / each.weight)).sqrt() for each in both)
            ranked[index] = fitted_maps.up_to(max(ranks))
            rows += [
                {"block": index, "kind": kind, "r": r, "error": seen[r].item(), "error_held_out": new[r].item()}
                for r in ranks
            ]
    if not rows:
        raise UsageError("on this text the tuned model does what the base does: there is nothing to fit")
    return maps, pd.DataFrame(rows)


def _moments(pair: Pair, texts: Texts) -> dict[int, PairMoments]:
    """Moments of `(h, dh)` at each block's output along the stream that the oracle steers, the tuned model's."""
    moments: dict[int, PairMoments] = {}
    for batch in texts.batches("Moments"):
        keep = batch.tokens.flatten()
        with record(pair.tuned, BLOCK) as targets:
            pair.tuned(**batch.inputs(pair.tuned))

        def delta(place: Place, h: torch.Tensor, keep: torch.Tensor = keep) -> torch.Tensor:
            dh = targets[place] - h
            x, y = (state.reshape(-1, state.shape[-1])[keep] for state in (h, dh))
            weight = 1 / x.double().square().sum(-1)
            moments.setdefault(place[1], PairMoments(x.shape[-1], x.device)).add(x, y, weight)
            return dh

        with edited(pair.base, BLOCK, delta):
            pair.base(**batch.inputs(pair.base))
    return moments


@torch.no_grad()
def _measured(
    pair: Pair,
    held_out: Texts,
    generated: Texts,
    steering: dict[int, LowRankMap] | None = None,
    model: Model | None = None,
) -> dict[str, float]:
    """Distances from the tuned model of `model`, by default the base, with maps added at its blocks' outputs."""
    model, steering = model or pair.base, steering or {}
    row: dict[str, float] = {}
    for suffix, texts in (("", held_out), ("_generated", generated)):
        distance = Distance()
        for batch in texts.batches("Measuring"):
            reference = pair.tuned(**batch.inputs(pair.tuned)).logits
            with edited(model, BLOCK if steering else (), lambda place, h: _delta(steering, place, h)):
                distance.add(batch, reference, model(**batch.inputs(model)).logits)
        summary = distance.summary()
        if not suffix:
            row |= {name: summary[name] for name in ("kl", "agreement")}
        row |= {f"{name}{suffix or '_answer'}": summary[f"{name}_answer"] for name in ("kl", "agreement")}
    return row


def _delta(steering: dict[int, LowRankMap], place: Place, h: torch.Tensor) -> torch.Tensor:
    return steering[place[1]](h) if place[1] in steering else torch.zeros_like(h)


def figure(models: pd.DataFrame, errors: pd.DataFrame) -> Figure:
    """Held-out errors by block and rank; KL by rank, beside the base's and the compared adapters'."""
    result = Figure(figsize=(12, 4), layout="constrained")
    left, right = result.subplots(1, 2)
    ranks, styles = sorted(errors["r"].unique()), {"affine": "-", "linear": ":"}
    for (kind, r), rows in errors.groupby(["kind", "r"]):
        color = f"C{ranks.index(r)}"
        left.plot(rows["block"], rows["error_held_out"], styles[kind], color=color, label=f"{kind}, r={r}")
    left.set(xlabel="block", ylabel="error of the map on held-out text", ylim=(0, None))
    for model, rows in models[models["r"].notna()].groupby("model"):
        right.plot(rows["r"], rows["kl_generated"], styles[model.split()[0]], color="black", marker="o", label=model)
    for row, color in zip(models[models["r"].isna()].itertuples(), cycle(("0.5", "C6", "C8", "C9", "C4"))):
        right.axhline(row.kl_generated, linestyle="--", color=color, label=Path(row.model).name)
    right.set(xlabel="rank", ylabel="KL along the tuned model's generations", xscale="log", ylim=(0, None))
    right.set_xticks(ranks, [str(r) for r in ranks])
    right.minorticks_off()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return result
