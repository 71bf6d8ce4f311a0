"""How much of what fine-tuning does to an MLP steering before it can do: the paper's first-order match, measured.

    peft-steer analyze first-order --base MODEL --tuned MODEL_OR_ADAPTER --task listops_short --output DIR

At tokens of real text, for every block: the shift `s = f(W + dW, h) - f(W, h)` that fine-tuning gives the output of
the MLP `f`, what of it lies beyond first order ("remainder"), and the part of the first order that comes from the last
linear layer, `(dW_d) m` ("down_share"). Post-MLP steering adds `dh = s` and is exact; "shift" is that `dh` relative
to the output. Pre-MLP steering reaches `A(h) dh` to first order, `A = df/dh` (arXiv 2603.00425, first-order
framework), for every "tolerance" at which small singular values of `A` count as zero: "outside" is the part of the
shift that it cannot reach ("outside_down": of `(dW_d) m`; "outside_inner": of the rest), "size" is `|dh| / |h|` of
the best `dh`, and "reached" the relative error of `f(W, h + dh)`, computed exactly: 0 is a perfect match, 1 as bad as
no steering. All are medians over tokens, computed in float64; "finite_difference" is the largest relative difference
between the derivative and a central difference.
"""

import argparse
import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from peft_steer.sites import Block
from peft_steer.utils.errors import UsageError

from .inputs.pairs import Pair, blocks_of, find_pair
from .inputs.texts import Texts, load_texts
from .maths.first_order_theory import TOLERANCES, Update, match
from .maths.mlp import find_mlp
from .output import check_same_run, facts_of, only_run, write_figure, write_table


_TOKEN_COLUMNS = ("remainder", "down_share", "shift")
_SPACE_COLUMNS = ("rank", "outside_down", "outside_inner", "outside", "size", "reached")


def run(args: argparse.Namespace) -> None:
    source = find_pair(args)
    chosen = _check_structure(source.base, args.layers_to_transform)
    texts, _ = load_texts(args, source.tokenizer)
    if args.tokens > len(texts.rows):
        raise UsageError(f"--tokens is {args.tokens}, but there are {len(texts.rows)} texts")
    facts = facts_of(args)
    with only_run(args.output):
        rows = _written(args.output, facts)
        pair = source.load()
        update_of = _updates(pair)
        states = inputs(pair.base, texts, args.tokens, args.seed)
        todo = [i for i in chosen if i not in {row["block"] for row in rows}]
        for i in tqdm(todo, desc="First order", unit="block"):
            rows = sorted([*rows, *measure(update_of(i), states[i], i)], key=lambda row: row["block"])
            write_table(args.output, "first_order", pd.DataFrame(rows), **facts)
    table = pd.DataFrame(rows)
    write_figure(args.output, "first_order", figure(table))
    print(summary(table).to_markdown(floatfmt=".3g"))


def measure(update: Update, h: torch.Tensor, block: int) -> list[dict[str, float]]:
    """A row of the table for each tolerance.

    Args:
        update: The change of the block's MLP.
        h: The MLP's inputs at some tokens, `(n, d)`, float64.
        block: Its index.
    """
    tokens = [match(update, each) for each in h]
    common = {name: statistics.median(token[name] for token in tokens) for name in _TOKEN_COLUMNS}
    common["finite_difference"] = max(token["finite_difference"] for token in tokens)
    return [
        {"block": block, "tolerance": tolerance, **common}
        | {name: statistics.median(token["spaces"][k][name] for token in tokens) for name in _SPACE_COLUMNS}
        for k, tolerance in enumerate(TOLERANCES)
    ]


@torch.no_grad()
def inputs(model: PreTrainedModel, texts: Texts, n: int, seed: int) -> list[torch.Tensor]:
    """The input of every block's MLP, `(n, d)`, float64, at one token of each of `n` texts, both drawn by `seed`."""
    draw = random.Random(seed)
    chosen = {row: draw.randrange(len(texts.rows[row][0])) for row in draw.sample(range(len(texts.rows)), n)}
    mlps = [find_mlp(block) for block in blocks_of(model)]
    states: list[list[torch.Tensor]] = [[] for _ in mlps]
    wanted: list[int] = []

    def keep(into: list[torch.Tensor]) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            into.append(args[0].reshape(-1, args[0].shape[-1])[wanted].double())

        return hook

    handles = [mlp.first.register_forward_pre_hook(keep(into)) for mlp, into in zip(mlps, states, strict=True)]
    try:
        first = 0
        for batch in texts.batches("Inputs"):
            rows, width = batch.input_ids.shape
            wanted[:] = [k * width + chosen[first + k] for k in range(rows) if first + k in chosen]
            first += rows
            if wanted:
                model(**batch.inputs(model))
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(each) for each in states]


def _check_structure(base: str, wanted: list[int] | None) -> list[int]:
    """The indices of the blocks to measure, whose structure is checked without loading weights."""
    with torch.device("meta"):
        blocks = blocks_of(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)))
    chosen = list(range(len(blocks))) if wanted is None else sorted(set(wanted))
    if chosen[-1] >= len(blocks):
        raise UsageError(f"--layers_to_transform: {chosen}, but the blocks are 0 to {len(blocks) - 1}")
    for block in blocks:
        find_mlp(block)
    return chosen


def _updates(pair: Pair) -> Callable[[int], Update]:
    """A function that returns the update of a block's MLP.

    Raises:
        UsageError: If fine-tuning changed no weight of any MLP.
    """
    blocks: list[tuple[Block, Block]] = list(zip(blocks_of(pair.base), blocks_of(pair.tuned), strict=True))

    def update(i: int) -> Update:
        return Update.between(*(find_mlp(block) for block in blocks[i]))

    if not any(change.any() for i in range(len(blocks)) for change in update(i).change.values()):
        raise UsageError(
            "--tuned: no weight of an MLP differs from the base's; there is no update that steering could replace"
        )
    return update


def _written(folder: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an interrupted run with the same settings."""
    path = folder / "first_order.json"
    if not path.is_file():
        return []
    before = json.loads(path.read_text())
    rows = before.pop("rows")
    check_same_run(path, before, facts)
    return rows


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each block: what does not depend on the tolerance, and pre-MLP steering at its best tolerance."""
    best = table.loc[table.groupby("block")["reached"].idxmin()].set_index("block")
    full = table[table["tolerance"] == 0].set_index("block")
    return best[["remainder", "down_share", "shift", "tolerance", "rank", "outside_down", "size", "reached"]].assign(
        size_exact=full["size"], reached_exact=full["reached"], finite_difference=full["finite_difference"]
    )


def figure(table: pd.DataFrame) -> Figure:
    """By block and tolerance: the part outside the column space, the error after steering, the size of `dh`."""
    result = Figure(figsize=(12, 3.9), layout="constrained")
    panels = result.subplots(1, 3)
    columns = {"outside_down": "part of dW_d m out of reach", "reached": "error after steering", "size": "|dh| / |h|"}
    for axes, (column, title) in zip(panels, columns.items(), strict=True):
        for tolerance, rows in table.groupby("tolerance", sort=False):
            label = f"tolerance {tolerance:g}" if tolerance else "all of A(h)"
            axes.plot(rows["block"], rows[column], marker=".", label=label)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("block")
        axes.grid(alpha=0.3)
    rows = table[table["tolerance"] == 0]
    panels[1].plot(rows["block"], rows["remainder"], "k:", label="weight update beyond first order")
    panels[1].axhline(1, color="grey", lw=1, label="no steering")
    for axes in panels[1:]:
        axes.set_yscale("log")
    handles, labels = panels[1].get_legend_handles_labels()
    result.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize="small")
    return result
