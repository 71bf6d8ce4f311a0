"""How an error in a block's output grows to the model's output, and the ranks that this suggests for the blocks.

    peft-steer analyze errors --base MODEL --task listops_short --output DIR
    peft-steer analyze errors --base MODEL --tuned MODEL_OR_ADAPTER --task listops_short --output DIR

"typical" is the gain of a random error of the same relative size at every token, and "largest" that of the worst
error, by power iteration; both by exact JVPs through the blocks that follow, to the last hidden state (arXiv
2603.00425, on the control of errors). "gain_rank" is in proportion to the typical gain. With a tuned model, "energy"
is what its blocks have to add to the base's, relative to their outputs (root mean square), and "energy_rank" leaves
out the least of it, weighted by the gains. Both cost as many parameters as the uniform rank `--r`. The last lines
printed are a `rank_pattern` for `PostBlockSteerConfig`. A quantized base is dequantized for the gains (which is exact
for 4 bits; 8-bit bases also round activations, and that is ignored).
"""

import argparse

import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedModel

from peft_steer.utils.errors import UsageError

from .capture.terms import Terms
from .inputs.pairs import Pair, PairSource, blocks_of, find_base, find_pair
from .inputs.texts import Texts, load_texts
from .maths import allocation
from .maths.jacobian import Tail, gains
from .maths.moments import Moments, warn_if_singular
from .output import facts_of, write_figure, write_table


def run(args: argparse.Namespace) -> None:
    source = find_base(args) if args.tuned is None else find_pair(args)
    width = AutoConfig.from_pretrained(source.base).get_text_config().hidden_size
    if args.r > width:
        raise UsageError(f"--r is {args.r}, more than the hidden size {width}")
    texts, _ = load_texts(args, source.tokenizer)
    if args.probes > len(texts.rows):
        raise UsageError(f"--probes is {args.probes}, but there are {len(texts.rows)} texts")
    pair = source.load() if isinstance(source, PairSource) else None
    base = source.load_base() if pair is None else pair.base
    spectra = None if pair is None else own_changes(pair, texts)
    if args.load_in_4bit or args.load_in_8bit:
        base = base.dequantize().requires_grad_(False)  # bitsandbytes' kernels have no forward-mode derivative
    table = measure(base, texts, args.probes, args.iterations, args.seed)
    typical = table["typical"].tolist()
    table["gain_rank"] = allocation.by_gain(typical, args.r, width)
    if spectra is not None:
        table["energy"] = [values.sum().item() ** 0.5 for values in spectra]
        table["energy_rank"] = allocation.by_energy(typical, spectra, args.r)
    ranks = table["gain_rank"] if spectra is None else table["energy_rank"]
    pattern = {block.name: int(rank) for block, rank in zip(blocks_of(base), ranks, strict=True)}
    write_table(args.output, "errors", table, **facts_of(args), rank_pattern=pattern)
    write_figure(args.output, "errors", figure(table, args.r))
    print(table.set_index("block").to_markdown(floatfmt=".3g"))
    print(f"\nr: {args.r}\nrank_pattern: {{" + ", ".join(f"{name}: {r}" for name, r in pattern.items()) + "}")


def measure(model: PreTrainedModel, texts: Texts, probes: int, iterations: int, seed: int) -> pd.DataFrame:
    """A row for each block: `largest`, the largest gain in any of the `probes` texts, and `typical`, the root mean
    square over them.

    Raises:
        UsageError: If a part of the model has no derivative in forward mode (Bloom's activation).
    """
    model.set_experts_implementation("eager")  # a mixture of experts' grouped product has no such derivative
    step = max(1, len(texts.rows) // probes)
    texts = Texts(texts.rows[::step][:probes], texts.batch_size, texts.pad, texts.device)
    generator = torch.Generator().manual_seed(seed)
    blocks = blocks_of(model)
    measured: list[list[torch.Tensor]] = [[] for _ in blocks]  # (largest, typical) of each batch, by block
    with tqdm(total=len(texts) * len(blocks), desc="Errors", unit="block") as bar:
        for batch in texts:
            tail = Tail(model.get_decoder(), blocks, batch.inputs(model))
            for i in range(len(blocks)):
                measured[i].append(torch.stack(gains(tail, i, batch.tokens, iterations, generator)).cpu())
                bar.update()
    rows = []
    for i, batches in enumerate(measured):
        largest, typical = torch.cat(batches, dim=1)
        rows.append({"block": i, "typical": typical.square().mean().sqrt().item(), "largest": largest.max().item()})
    return pd.DataFrame(rows)


@torch.no_grad()
def own_changes(pair: Pair, texts: Texts) -> list[torch.Tensor]:
    """What each block has to add: the difference between the tuned block's output and the base's where both read the
    base's input, relative to the norm of the base's output.

    Returns:
        The spectrum of its second moment for each block, `(d,)`, descending.

    Raises:
        UsageError: If no block changes anything.
    """
    before, after = Terms(blocks_of(pair.base)), Terms(blocks_of(pair.tuned))
    moments: list[Moments] = []
    for batch in texts.batches("Spectra"):
        with before.recording():
            pair.base(**batch.inputs(pair.base))
        with after.recording(before.inputs):
            pair.tuned(**batch.inputs(pair.tuned))
        for i in range(len(before.blocks)):
            h, target = (terms.of(i, batch.tokens).sum(0) for terms in (before, after))
            if i == len(moments):
                moments.append(Moments(h.shape[-1], h.device))
            moments[i].add((target - h) / h.norm(dim=-1, keepdim=True))
    warn_if_singular(moments[-1], "what each block has to add")
    if not any(each.square.any() for each in moments):
        raise UsageError("on this text the tuned model does what the base does: no block has anything to add")
    return [torch.linalg.eigvalsh(each.square / each.n).flip(0).clamp(min=0).cpu() for each in moments]


def figure(table: pd.DataFrame, r: int) -> Figure:
    """Gains and ranks by block."""
    result = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = result.subplots(1, 2)
    for name in ("largest", "typical"):
        left.plot(table["block"], table[name], marker=".", label=name)
    left.axhline(1, color="grey", lw=1)
    left.set_yscale("log")
    left.set_ylabel("gain of a relative error")
    left.legend(frameon=False)
    labels = {"gain_rank": "by gain", "energy_rank": "by gain and energy"}
    for name, label in labels.items():
        if name in table:
            right.step(table["block"], table[name], where="mid", label=label)
    right.axhline(r, color="grey", lw=1, label="uniform")
    right.set_ylabel("suggested rank")
    right.legend(frameon=False, fontsize="small")
    for axes in (left, right):
        axes.set_xlabel("block")
        axes.grid(alpha=0.3)
    return result
