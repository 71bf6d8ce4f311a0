"""The two halves of a joint adapter: whether they work in the same directions, and what each does alone.

    peft-steer analyze joint --base MODEL --adapter DIR --task listops_short --output DIR

In every steered block: the overlap of the directions that LoRA writes through the linear layer that ends the MLP (the
columns of its `lora_B`) with those that steering reads (the rows of `W_down`) and writes (the columns of `W_up`); and
of what steering reads with what it writes. An overlap is the mean squared cosine of the principal angles between two
subspaces, 1 where the smaller lies in the larger, 0 where they are orthogonal; "chance" is that of random subspaces of
these dimensions, "chance_steering" of steering's two. (arXiv 2603.00425, joint adaptation, keeps the first at 0.)
"size" is the norm of the product that each half writes with, `scaling * B A` and `W_up W_down`. Then the task's score
with LoRA alone, steering alone, both and neither, on the split that it is evaluated on.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch
from lm_eval.api.task import ConfigurableTask
from matplotlib.figure import Figure
from peft import PeftModel

from peft_steer import JointLowRank, JointSteerLayer, JointSteerLoraConfig
from peft_steer.evaluation import tasks
from peft_steer.evaluation.lm import PeftSteerLM
from peft_steer.evaluation.scoring import score

from .inputs.pairs import add_base_arguments, check_adapter, find_base, read_adapter_config
from .output import facts_of, write_figure, write_table


HALVES = ("neither", "lora", "steer", "both")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_base_arguments(parser)
    add = parser.add_argument
    add("--adapter", required=True, metavar="DIR_OR_ID", help="a joint adapter of the base")
    add("--task", required=True, metavar="NAME", help="an lm-eval task")
    add("--include_path", metavar="DIR", help="a folder with more lm-eval tasks")
    add("--num_fewshot", type=int, help="examples in a prompt, instead of the task's own number")
    add("--limit", type=int, help="at most so many documents (default: all)")
    add("--batch_size", type=int, default=8, help="documents at a time (default: 8)")
    add("--output", "-o", type=Path, required=True, metavar="DIR", help="tables and figure")


def run(args: argparse.Namespace) -> None:
    for name in ("limit", "batch_size"):
        if (number := getattr(args, name)) is not None and number < 1:
            raise ValueError(f"--{name} is {number}, it must be at least 1")
    source = find_base(args)
    config = read_adapter_config(args.adapter, "--adapter")
    if not isinstance(config, JointSteerLoraConfig):
        raise ValueError(f"--adapter: {args.adapter!r} is a {config.peft_type.value} adapter, not a joint one")
    check_adapter(source.base, args.base, args.adapter, "--adapter")
    task, _ = tasks.load_task(args.task, args.include_path, args.num_fewshot)
    model = source.load_adapter(args.adapter)
    table = overlaps(model)
    facts = facts_of(args)
    write_table(args.output, "joint_overlap", table, **facts)
    print(table.set_index("block").to_markdown(floatfmt=".3f"))
    harness = PeftSteerLM(pretrained=model, tokenizer=source.tokenizer, batch_size=args.batch_size)
    rows = []
    for halves in HALVES:
        rows.append({"halves": halves, **_score(harness, model, halves, task, args.limit)})
        scores = pd.DataFrame(rows)
        write_table(args.output, "joint_scores", scores, **facts)
    write_figure(args.output, "joint", figure(table, scores))
    print(f"\n{scores.to_markdown(index=False, floatfmt='.3f')}")


@torch.no_grad()
def overlaps(model: PeftModel, adapter_name: str = "default") -> pd.DataFrame:
    """One row for every block whose MLP ends in a linear layer with LoRA and that a low-rank edit steers.

    Raises:
        ValueError: If there is no such block.
    """
    rows = []
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, JointSteerLayer) or adapter_name not in layer.steer_edit:
            continue
        edit = layer.steer_edit[adapter_name]
        if not isinstance(edit, JointLowRank):
            continue
        lora = edit.writer
        A, B = lora.lora_A[adapter_name].weight.double(), edit.B.double()
        reads, writes = edit.W_read.double().t(), edit.W_up.double()
        rows.append(
            {
                "block": name.removesuffix(".steering"),
                "lora_steering_reads": overlap(B, reads),
                "lora_steering_writes": overlap(B, writes),
                "steering_reads_writes": overlap(reads, writes),
                "chance": max(B.shape[1], reads.shape[1]) / len(B),
                "chance_steering": reads.shape[1] / len(B),
                "size_lora": (B @ A).norm().item() * lora.scaling[adapter_name],
                "size_steering": (writes @ reads.t()).norm().item() * layer.strength(adapter_name),
            }
        )
    if not rows:
        raise ValueError(
            "--adapter: no block is steered by a low-rank edit and has LoRA at the linear layer that ends its MLP"
        )
    return pd.DataFrame(rows)


def overlap(X: torch.Tensor, Y: torch.Tensor) -> float:
    """Mean squared cosine of the principal angles between the column spaces of `X` and `Y`, `(d, r)` each; NaN if one
    of them is zero."""
    first, second = (_basis(x) for x in (X, Y))
    smaller = min(first.shape[1], second.shape[1])
    return (first.t() @ second).square().sum().item() / smaller if smaller else float("nan")


def _basis(X: torch.Tensor) -> torch.Tensor:
    U, S, _ = torch.linalg.svd(X, full_matrices=False)
    return U[:, 1e-6 * S[0] < S] if S[0] > 0 else U[:, :0]


def _score(harness: PeftSteerLM, model: PeftModel, halves: str, task: ConfigurableTask, limit: int | None) -> dict:
    """The task's score with these halves of the adapter."""
    context = model.disable_adapter() if halves == "neither" else model.base_model.set_halves(halves)
    with context:
        found = score(harness, task, limit)
    return {key: found[key] for key in ("metric", "score", "stderr", "n")}


def figure(table: pd.DataFrame, scores: pd.DataFrame) -> Figure:
    """Overlaps by block, and the scores of the halves."""
    result = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = result.subplots(1, 2, width_ratios=(2, 1))
    labels = {
        "lora_steering_reads": "LoRA writes, steering reads",
        "lora_steering_writes": "LoRA writes, steering writes",
        "steering_reads_writes": "steering reads, steering writes",
    }
    for name, label in labels.items():
        left.plot(table[name], marker=".", label=label)
    left.plot(table["chance"], color="grey", lw=1, label="chance")
    if not table["chance_steering"].equals(table["chance"]):
        left.plot(table["chance_steering"], ":", color="grey", lw=1, label="chance, steering with itself")
    left.set_xlabel("block")
    left.set_ylabel("overlap")
    left.legend(frameon=False, fontsize="small")
    left.grid(alpha=0.3)
    right.bar(scores["halves"], scores["score"], yerr=scores["stderr"].fillna(0).astype(float), width=0.6)
    right.set_ylabel(scores["metric"].iloc[0])
    right.grid(axis="y", alpha=0.3)
    return result
