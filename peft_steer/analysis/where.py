"""In which term of each block's output the change made by fine-tuning lies: the MLP's, the attention's, the skip path.

    peft-steer analyze where --base MODEL --tuned MODEL_OR_ADAPTER --task listops_short --output DIR

Post-MLP steering reads the MLP's term alone; what fine-tuning changes in the others passes it by through the skip
connection (arXiv 2603.00425, on where to steer). `dH` is the change of a block's output: for "stream" the difference
between the two models as they are, with all that earlier blocks have changed; for "own" what this block changes when
the base's and the tuned model's block both read the base's input.

For each term t of it: "share" is `<dt, dH> / |dH|^2`, and the shares of a block add up to 1; "norm" is `|dt| / |dH|`;
"reached" is `1 - |dH - dt|^2 / |dH|^2`, the part of `dH` that an oracle at that place alone reproduces, negative if it
leads away. "change" is `|dH|` relative to the base's output; "size" of the attention and of the MLP is the norm of
what they add in the base, relative to what it is added to. All are means over tokens ("norm": root mean square).
"edit" is what a steering adapter adds at the block's output.
"""

import argparse

import pandas as pd
import torch
from matplotlib.figure import Figure

from peft_steer.utils.errors import UsageError

from .capture.terms import TERMS, Terms
from .inputs.pairs import Pair, blocks_of, find_pair
from .inputs.texts import Texts, load_texts
from .output import facts_of, write_figure, write_table


def run(args: argparse.Namespace) -> None:
    source = find_pair(args)
    texts, _ = load_texts(args, source.tokenizer)
    table = measure(source.load(), texts)
    facts = facts_of(args) | {"num_tokens": texts.num_tokens}
    write_table(args.output, "where", table, **facts)
    write_figure(args.output, "where", figure(table))
    shown = ["block", "change", *(f"share_{term}" for term in TERMS), "reached_mlp"]
    for change, rows in table.groupby("of"):
        print(f"\n{change}\n\n{rows[shown].set_index('block').to_markdown(floatfmt='.3f')}")
    own = table[table["of"] == "own"]["share_mlp"]
    print(f"\nThe MLP's share of what a block changes: {own.min():.0%} to {own.max():.0%}, median {own.median():.0%}.")


@torch.no_grad()
def measure(pair: Pair, texts: Texts) -> pd.DataFrame:
    """Two rows for each block, `of` the `"stream"`'s change and of the block's `"own"`, with the columns above.

    Raises:
        UsageError: If a block's output is not the sum of its terms, or no block's output changes.
    """
    before, after = Terms(blocks_of(pair.base)), Terms(blocks_of(pair.tuned))
    sums = {name: [_Block() for _ in before.blocks] for name in ("stream", "own")}
    for batch in texts.batches("Where"):
        present = batch.tokens
        with before.recording():
            pair.base(**batch.inputs(pair.base))
        before.check_sums(present)
        for name, inputs in (("stream", None), ("own", before.inputs)):
            with after.recording(inputs):
                pair.tuned(**batch.inputs(pair.tuned))
            for i, block in enumerate(sums[name]):
                block.add(before.of(i, present), after.of(i, present))
    if not any(block.changed for block in sums["stream"]):
        raise UsageError("on this text the tuned model does what the base does: there is no change to look at")
    return pd.DataFrame(
        {"of": name, "block": i, **block.summary()} for name, blocks in sums.items() for i, block in enumerate(blocks)
    )


class _Block:
    """Sums over the tokens of one block, in float64. A token's changes are first divided by `|dH|`, so that the few
    tokens with enormous activations do not dominate."""

    def __init__(self) -> None:
        self.gram = torch.zeros(len(TERMS), len(TERMS), dtype=torch.float64)
        self.sizes = torch.zeros(3, dtype=torch.float64)
        self.tokens = self.changed = 0

    def add(self, base: torch.Tensor, tuned: torch.Tensor) -> None:
        """The terms of both models, `(4, n, d)` each."""
        change = tuned - base
        total = change.sum(0).norm(dim=-1)
        moved = total > 0
        change = change[:, moved] / total[moved, None]
        self.gram += torch.einsum("ind,jnd->ij", change, change).cpu()
        skip, attention, mlp = base[0], base[1], base[2]
        ratios = (
            total / base.sum(0).norm(dim=-1),
            attention.norm(dim=-1) / skip.norm(dim=-1),
            mlp.norm(dim=-1) / (skip + attention).norm(dim=-1),
        )
        self.sizes += torch.stack([ratio.sum() for ratio in ratios]).cpu()
        self.tokens += len(total)
        self.changed += int(moved.sum())

    def summary(self) -> dict[str, float]:
        """Columns of the table; NaN for the shares of a change that is zero."""
        gram = self.gram / self.changed if self.changed else torch.full_like(self.gram, torch.nan)
        sizes = dict(zip(("change", "size_attention", "size_mlp"), (self.sizes / self.tokens).tolist(), strict=True))
        share, square = gram.sum(1), gram.diagonal()
        columns = {"share": share, "norm": square.sqrt(), "reached": 2 * share - square}
        return sizes | {
            f"{name}_{term}": column[i].item() for name, column in columns.items() for i, term in enumerate(TERMS)
        }


def figure(table: pd.DataFrame) -> Figure:
    """Shares of the block's own change and of the stream's, and the sizes of the terms, by block."""
    result = Figure(figsize=(12, 3.6), layout="constrained")
    panels = result.subplots(1, 3)
    titles = {"own": "what the block itself changes", "stream": "change of the whole stream"}
    terms = [term for term in TERMS if table[f"norm_{term}"].max() > 0.01]
    for axes, (change, title) in zip(panels, titles.items(), strict=False):
        rows = table[table["of"] == change]
        for term in terms:
            axes.plot(rows["block"], rows[f"share_{term}"], marker=".", color=f"C{TERMS.index(term)}", label=term)
        axes.plot(rows["block"], rows["reached_mlp"], ":", color="C2", label="reached by an MLP oracle")
        axes.set_title(title, fontsize="medium")
        axes.set_ylabel("share of dH")
        axes.set_ylim(-0.25, 1.4)
    panels[0].legend(frameon=False, fontsize="small", loc="upper center", ncols=2)
    rows = table[table["of"] == "own"]
    for i, term in ((1, "attention"), (2, "mlp")):
        panels[2].plot(rows["block"], rows[f"size_{term}"], marker=".", color=f"C{i}", label=term)
    panels[2].set_yscale("log")
    panels[2].set_title("what they add in the base", fontsize="medium")
    panels[2].set_ylabel("norm relative to the stream")
    for axes in panels:
        axes.set_xlabel("block")
        axes.grid(alpha=0.3)
    return result
