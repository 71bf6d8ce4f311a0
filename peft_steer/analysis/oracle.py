"""Steers a base model by what fine-tuning does to its hidden states: `dh = h_tuned - h_base` at a site of every block.

    peft-steer analyze oracle --base MODEL --tuned MODEL_OR_ADAPTER --task listops_short --output DIR

This is the paper's oracle (arXiv 2603.00425): the site's output becomes the tuned model's. "block" reaches the tuned
model except for its final norm and head, "attention" and "mlp" reach what fine-tuning does at that site. (That does
not bound steering there: another `dh` after the MLP could also make up for what the attention changed, as far as the
MLP's output shows that.) "kl" is KL(tuned || steered base) in nats a token, "agreement" how often both have the
same first choice, "_answer" marks the answers alone; "final_error" is the distance of the last block's output from the
tuned model's, relative to the base's.

The spectra are of the vectors `dh` added in each block: "rms", also "relative" to that of `h`; "constant", the share
of `E |dh|^2` in the mean; "effective_rank", exp of the entropy of the covariance's eigenvalues `l`; "participation",
`(sum l)^2 / sum l^2`; "energy_r", the share of the first r. Their moments take 8 d^2 bytes for each block and site.
"""

import argparse

import pandas as pd
import torch
from matplotlib.figure import Figure

from peft_steer import needs_prompts
from peft_steer.utils.errors import UsageError

from .capture.generation import continuations
from .capture.steering import Place, edited, oracle, record
from .inputs.pairs import Pair, blocks_of, find_pair
from .inputs.texts import Batch, Texts, load_texts
from .maths.distance import Distance
from .maths.moments import Moments, spectrum, warn_if_singular
from .output import facts_of, write_figure, write_table


SITES = {"attention": ("attention",), "mlp": ("mlp",), "attention+mlp": ("attention", "mlp"), "block": ("block",)}
RANKS = (1, 2, 4, 8, 16, 32, 64)
UNSTEERED = "block, unsteered"


def run(args: argparse.Namespace) -> None:
    source = find_pair(args)
    texts, held_out = load_texts(args, source.tokenizer)
    pair = source.load()
    facts = facts_of(args) | {"num_tokens": texts.num_tokens}
    distances, spectra = measure(pair, texts)
    write_table(args.output, "oracle", distances, **facts)
    write_table(args.output, "spectra", spectra, **facts)
    write_figure(args.output, "oracle", distance_figure(distances))
    write_figure(args.output, "spectra", spectra_figure(spectra))
    print(distances.to_markdown(index=False, floatfmt=".3g"))
    print(f"Spectra and figures: {args.output}")
    if needs_prompts(pair.tuned):
        print("Generations are not compared: the tuned model's adapter would not know where a prompt ends.")
        return
    same = same_generations(pair, held_out, args.new_tokens)
    write_table(args.output, "oracle", distances, **facts, same_generations=same)
    print(
        f"Steered at the block, the base generates what the tuned model does after {same:.1%} of "
        f"{len(held_out.rows)} prompts."
    )


@torch.no_grad()
def measure(pair: Pair, texts: Texts) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Distances of the steered base from the tuned model, by site; spectra of the vectors added, by site and block.

    The spectra of `UNSTEERED` are of the differences between the two models as they are, which build up over the
    blocks; those of `"block"` are of what each block adds to them.

    Raises:
        UsageError: If the tuned model does what the base does.
    """
    last = ("block", len(blocks_of(pair.base)) - 1)
    distances = {name: Distance() for name in ("none", *SITES)}
    missed = dict.fromkeys(distances, 0.0)
    vectors: dict[Place, _Vectors] = {}
    for batch in texts.batches("Oracle"):
        with record(pair.tuned, ("attention", "mlp", "block")) as targets:
            reference = pair.tuned(**batch.inputs(pair.tuned)).logits
        for name, sites in (("none", ()), *SITES.items()):

            def delta(
                place: Place, h: torch.Tensor, batch: Batch = batch, alone: bool = len(sites) == 1
            ) -> torch.Tensor:
                dh = targets[place] - h
                if alone:
                    _add(vectors, place, batch, h, dh)
                return dh

            with edited(pair.base, sites, delta), record(pair.base, ("block",)) as states:
                distances[name].add(batch, reference, pair.base(**batch.inputs(pair.base)).logits)
            missed[name] += (targets[last] - states[last])[batch.tokens].double().square().sum().item()
            if name == "none":
                for (_, i), h in states.items():
                    _add(vectors, (UNSTEERED, i), batch, h, targets["block", i] - h)
    if not missed["none"]:
        raise UsageError("on this text the tuned model does what the base does: there is nothing to steer by")
    warn_if_singular(vectors[last].moments, "each dh")
    rows = [
        {"site": name, **distances[name].summary(), "final_error": (missed[name] / missed["none"]) ** 0.5}
        for name in distances
    ]
    return pd.DataFrame(rows), pd.DataFrame(
        {"site": site, "block": i, **dh.summary()} for (site, i), dh in sorted(vectors.items())
    )


class _Vectors:
    """The `dh` of one place, and the size of the `h` that it is added to."""

    def __init__(self, d: int, device: torch.device):
        self.moments = Moments(d, device)
        self.square = 0.0

    def add(self, h: torch.Tensor, dh: torch.Tensor) -> None:
        """`h`, `dh`: `(n, d)`."""
        self.moments.add(dh)
        self.square += h.double().square().sum().item()

    def summary(self) -> dict[str, float]:
        """The spectrum, and `relative`: `rms` relative to that of `h`."""
        columns = spectrum(self.moments, RANKS)
        return {"relative": columns["rms"] / (self.square / self.moments.n) ** 0.5, **columns}


def _add(vectors: dict[Place, _Vectors], place: Place, batch: Batch, h: torch.Tensor, dh: torch.Tensor) -> None:
    """Adds the vectors at a batch's tokens."""
    keep = batch.tokens.flatten()  # (some models flatten rows and tokens inside a block)
    h, dh = (x.reshape(-1, x.shape[-1])[keep] for x in (h, dh))
    vectors.setdefault(place, _Vectors(dh.shape[-1], dh.device)).add(h, dh)


def same_generations(pair: Pair, texts: Texts, new_tokens: int) -> float:
    """The share of prompts after which the base, steered at the block, generates what the tuned model does."""
    theirs = continuations(pair.tuned, texts, pair.tokenizer, new_tokens)
    with oracle(pair.base, pair.tuned, ("block",)):
        ours = continuations(pair.base, texts, pair.tokenizer, new_tokens)
    same = [a == b for a, b in zip(theirs.rows, ours.rows, strict=True)]
    return sum(same) / len(same)


def distance_figure(distances: pd.DataFrame) -> Figure:
    """KL and error of each site."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(distances["site"], distances["kl"].clip(lower=1e-9), label="all tokens", width=0.4, align="edge")
    left.bar(distances["site"], distances["kl_answer"].clip(lower=1e-9), label="answers", width=-0.4, align="edge")
    left.set_yscale("log")
    left.set_ylabel("KL to the tuned model, nats")
    left.legend(frameon=False)
    right.bar(distances["site"], distances["final_error"])
    right.set_ylabel("error of the last hidden state")
    for axes in (left, right):
        axes.tick_params(axis="x", rotation=25)
        axes.grid(axis="y", alpha=0.3)
    return figure


def spectra_figure(spectra: pd.DataFrame) -> Figure:
    """Size, effective rank and energy at rank 8 of `dh` in each block."""
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    panels = {"relative": "rms dh / rms h", "effective_rank": "effective rank of dh", "energy_8": "energy at rank 8"}
    for axes, (column, label) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for site, rows in spectra.groupby("site"):
            axes.plot(rows["block"], rows[column], marker=".", label=site)
        axes.set_xlabel("block")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    return figure
