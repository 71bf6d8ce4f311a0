"""The two halves of a joint adapter: whether they work in the same directions, and what each scores alone.

    peft-steer analyze joint --base MODEL --adapter DIR --task listops_short --output DIR

In every steered block: the overlap of the directions that LoRA writes through the MLP's last linear layer (the columns
of its `lora_B`) with those that steering reads (the rows of `W_down`) and writes (the columns of `W_up`), and of those
that steering reads with those that it writes. An overlap is the mean squared cosine of the principal angles between
two subspaces: 1 if the smaller lies in the larger, 0 if they are orthogonal. "chance" is that of random subspaces of
these dimensions, "chance_steering" that of steering's two. (arXiv 2603.00425, joint adaptation, keeps the first at 0.)
"size" is the norm of each half's product, `scaling * B A` and `scale * W_up W_down`. Then the task's score with LoRA
alone, steering alone, both and neither, on the split that the task is evaluated on.
"""

import argparse
from contextlib import AbstractContextManager
from typing import cast

import pandas as pd
import torch
from lm_eval.api.task import ConfigurableTask
from matplotlib.figure import Figure
from peft import PeftModel, PeftType

from peft_steer import JointLowRank, JointSteerLayer, JointSteerLoraConfig, JointSteerLoraModel
from peft_steer.evaluation import tasks
from peft_steer.evaluation.lm import PeftSteerLM
from peft_steer.evaluation.scoring import score
from peft_steer.utils.errors import UsageError, usage_errors

from .inputs.adapters import check_adapter, read_adapter_config
from .inputs.pairs import find_base
from .output import facts_of, write_figure, write_table


HALVES = ("neither", "lora", "steer", "both")


def run(args: argparse.Namespace) -> None:
    source = find_base(args)
    config = read_adapter_config(args.adapter, "--adapter")
    if not isinstance(config, JointSteerLoraConfig):
        kind = PeftType(config.peft_type).value
        raise UsageError(f"--adapter: {args.adapter!r} is a {kind} adapter, not a joint one")
    check_adapter(source.base, args.base, args.adapter, "--adapter")
    with usage_errors():
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
    """A row for each block that a low-rank edit steers and whose MLP ends in a linear layer with LoRA.

    Raises:
        UsageError: If there is no such block.
    """
    rows = []
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, JointSteerLayer) or adapter_name not in layer.steer_edit:
            continue
        edit = layer.steer_edit[adapter_name]
        if not isinstance(edit, JointLowRank):
            continue
        lora = edit.writer
        A, B = cast(torch.Tensor, lora.lora_A[adapter_name].weight).double(), edit.B.double()
        reads, writes = edit.W_read.double().t(), edit.W_up.double()
        rows.append(
            {
                "block": name.removesuffix(".steering"),
                "lora_steering_reads": subspace_overlap(B, reads),
                "lora_steering_writes": subspace_overlap(B, writes),
                "steering_reads_writes": subspace_overlap(reads, writes),
                "chance": max(B.shape[1], reads.shape[1]) / len(B),
                "chance_steering": reads.shape[1] / len(B),
                "size_lora": (B @ A).norm().item() * lora.scaling[adapter_name],
                "size_steering": (writes @ reads.t()).norm().item() * layer.strength(adapter_name),
            }
        )
    if not rows:
        raise UsageError(
            "--adapter: no block is steered by a low-rank edit and has LoRA at the linear layer that ends its MLP"
        )
    return pd.DataFrame(rows)


def subspace_overlap(X: torch.Tensor, Y: torch.Tensor) -> float:
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
    if halves == "neither":
        context: AbstractContextManager = model.disable_adapter()
    else:
        context = cast(JointSteerLoraModel, model.base_model).set_halves(halves)
    with context:
        result = score(harness, task, limit)
    return {key: result[key] for key in ("metric", "score", "stderr", "n")}


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
