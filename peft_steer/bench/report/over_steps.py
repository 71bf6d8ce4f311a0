"""Figures for a README that are not of every comparison: the reward over the steps, and gain against loss."""

import math
import textwrap
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .frame import Setting
from .picture import panels
from .retention import frontier


# What a trainer recorded, and its axis.
CURVES = {
    "reward": "reward",
    "kl": "KL to the reference, estimated on the rollouts",
    "length": "tokens of an answer",
    "entropy": "entropy, nats per token",
    "margin": "margin of the preferred answer",
}


def mean_curve(curves: dict[int, list[tuple[int, float]]]) -> list[tuple[int, float]]:
    """The mean over seeds at the steps that all of them have."""
    by_seed = [dict(points) for points in curves.values()]
    steps = sorted(set.intersection(*(set(points) for points in by_seed)))
    return [(step, sum(points[step] for points in by_seed) / len(by_seed)) for step in steps]


def pictures(settings: list[Setting]) -> dict[str, Figure]:
    """The figures that the settings have data for, by the name of their file."""
    made = {}
    rewarded = [setting for setting in settings if any("reward" in row.curves for row in setting.done)]
    kept = [setting for setting in settings if len(frontier(setting)) > 1]
    if rewarded:
        made["reward"] = panels(rewarded, _reward)
    if kept:
        made["frontier"] = panels(kept, _frontier)
    return made


def _reward(axes: Axes, setting: Setting) -> None:
    """A thin line for every seed and a thick one for their mean."""
    for number, row in enumerate(row for row in setting.done if "reward" in row.curves):
        colour, curves = f"C{number % 10}", row.curves["reward"]
        for points in curves.values() if len(curves) > 1 else ():
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=0.7, alpha=0.35)
        mean = mean_curve(curves)
        style = "-" if number < 10 else "--"
        axes.plot(*zip(*mean, strict=True), color=colour, linestyle=style, linewidth=2, label=_short(row.label))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("reward")


def _frontier(axes: Axes, setting: Setting) -> None:
    points = frontier(setting)
    best = sorted((point for point in points if point.best), key=lambda point: point.loss)
    axes.step([p.loss for p in best], [p.gain for p in best], where="post", color="0.5", linestyle=":")
    for point, marker in zip(points, cycle("osD^vPX<>*hpd")):
        axes.errorbar(
            point.loss,
            point.gain,
            xerr=None if math.isnan(point.loss_error) else point.loss_error,
            yerr=point.gain_error,
            fmt=marker,
            markersize=8,
            capsize=3,
            label=_short(point.label),
        )
    axes.set_xlabel(points[0].axis)
    axes.set_ylabel(f"gain in {setting.metric} over the base, 95 % intervals")


def _short(label: str) -> str:
    return textwrap.shorten(label, 40).replace("$", r"\$")
