"""The figure for a README: score against trainable parameters, one panel for every model and task."""

import math
import textwrap
from collections.abc import Callable
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .frame import Setting


def picture(settings: list[Setting]) -> Figure:
    """Means with their standard errors; an untrained base is the dashed line."""
    return panels(settings, _panel)


def panels(settings: list[Setting], draw: Callable[[Axes, Setting], None]) -> Figure:
    """A figure with axes for each setting, two in a row, on which `draw` draws it."""
    n_columns = min(2, len(settings))
    n_rows = math.ceil(len(settings) / n_columns)
    figure = Figure(figsize=(9 * n_columns, 4.5 * n_rows), layout="constrained")
    axes_of = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    for axes, setting in zip(axes_of, settings, strict=False):
        draw(axes, setting)
        axes.set_title(textwrap.fill(setting.title, 90), fontsize="small")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize="small")
    for axes in axes_of[len(settings) :]:
        axes.set_axis_off()
    return figure


def _panel(axes: Axes, setting: Setting) -> None:
    ranked = sorted(setting.done, key=lambda row: -row.mean)
    for row, marker in zip(ranked, cycle("osD^vPX<>*hpd")):
        assert row.summary is not None  # of `done`
        mean, stderr, trainable = row.summary.mean, row.summary.stderr, row.costs["trainable"]
        label = f"{textwrap.shorten(row.label, 40)} ({mean:.3f})".replace("$", r"\$")
        if trainable == 0:
            axes.axhline(mean, color="0.4", linestyle="--", label=label)
            axes.axhspan(mean - stderr, mean + stderr, color="0.4", alpha=0.15, linewidth=0)
        else:
            axes.errorbar(trainable, mean, yerr=stderr, fmt=marker, markersize=8, capsize=4, label=label)
    if any(row.costs["trainable"] > 0 for row in ranked):
        axes.set_xscale("log")
    axes.set_xlabel("trainable parameters")
    axes.set_ylabel(f"{setting.metric} ± standard error")
