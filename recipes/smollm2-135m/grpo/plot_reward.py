"""Draws the reward over the steps of several runs of `peft-steer grpo`, and their mean.

python recipes/smollm2-135m/grpo/plot_reward.py results/grpo/seed-* --output docs/grpo_reward.png
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure


def rewards(run: Path) -> dict[int, float]:
    """The reward by step, from the log history of the last checkpoint in an output directory."""
    states = sorted(run.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    if not states:
        raise FileNotFoundError(f"{run} has no checkpoint-*/trainer_state.json")
    return {row["step"]: row["reward"] for row in json.loads(states[-1].read_text())["log_history"] if "reward" in row}


def draw(runs: dict[str, dict[int, float]], title: str) -> Figure:
    """A thin line for each run and a thick one for the mean over the steps that all of them have."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, curve in runs.items():
        axes.plot(list(curve), list(curve.values()), linewidth=1, marker=".", alpha=0.6, label=name)
    steps = sorted(set.intersection(*(set(curve) for curve in runs.values())))
    means = [sum(curve[step] for curve in runs.values()) / len(runs) for step in steps]
    axes.plot(steps, means, color="black", linewidth=2.5, label=f"mean of {len(runs)}")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("reward: share of sampled answers that are right")
    axes.set_ylim(0, 1)
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", frameon=False)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output directories of peft-steer grpo")
    parser.add_argument("--output", type=Path, default=Path("grpo_reward.png"))
    parser.add_argument("--title", default="GRPO with a post-block adapter: SmolLM2-135M-Instruct on list_max_min")
    given = parser.parse_args()
    draw({run.name: rewards(run) for run in given.runs}, given.title).savefig(given.output, dpi=120)
