"""The figures of the page, by plotly. A method has the same colour and symbol in all figures of its setting."""

import html
import math

import plotly.graph_objects as go
from plotly.colors import qualitative

from .frame import Row, Setting
from .over_steps import CURVES, mean_curve
from .retention import Point, frontier


_COSTS = {
    "training, seconds": "train_seconds",
    "training, tokens per second": "tokens_per_second",
    "peak memory, bytes": "peak_bytes",
    "saved for backward, bytes": "saved_bytes",
    "file, bytes": "adapter_bytes",
    "decoding time, ratio to the base's": "decode_ratio",
    "forgetting, nats per token": "forgetting",
}
_COLOURS = qualitative.Dark24
_SYMBOLS = ("circle", "square", "diamond", "cross", "x", "triangle-up", "star")
_TEXT = "#1a1a1a"


def figures(setting: Setting) -> dict[str, go.Figure]:
    """The figures that the setting has data for, by title."""
    made = {}
    if setting.done:
        made["Score and trainable parameters"] = _parameters(setting)
    if any(not math.isnan(row.costs["train_seconds"]) for row in setting.done):
        made["Score and cost"] = _cost(setting)
    if len(setting.done) > 1:
        made["Every pair"] = _pairs(setting)
    if setting.sweep.groupby(["method", "variant"])["learning_rate"].nunique().gt(1).any():
        made["Learning rates, on the validation split"] = _rates(setting)
    if any(row.losses for row in setting.done):
        made["Training loss"] = _losses(setting)
    for name, title in CURVES.items():
        if any(name in row.curves for row in setting.done):
            made[title] = _curve(setting, name)
    if points := frontier(setting):
        made["Gain against loss"] = _frontier(setting, points)
    return made


def _name(text: str) -> str:
    return html.escape(text)  # plotly reads tags in names


def _style(setting: Setting, method: str) -> tuple[str, str]:
    index = list(dict.fromkeys(row.method for row in setting.rows)).index(method)
    return _COLOURS[index % len(_COLOURS)], _SYMBOLS[index % len(_SYMBOLS)]


def _figure(x_title: str, y_title: str, n_legend: int, log_x: bool = False) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template="plotly_white",
        font={"color": _TEXT, "size": 13},
        margin={"l": 60, "r": 10, "t": 36, "b": 50},  # above: the buttons
        height=400 + 20 * n_legend,
        legend={"yanchor": "top", "y": -0.2, "x": 0, "tracegroupgap": 0},
        hoverlabel={"namelength": -1},
        xaxis={"title": x_title, "type": "log" if log_x else "linear", "exponentformat": "SI", "tickangle": 0},
        yaxis={"title": y_title},
    )
    return figure


def _points(setting: Setting, rows: list[Row], x: list[float], name: str) -> list[go.Scatter]:
    traces = []
    for row, value in zip(rows, x, strict=True):
        summary, (colour, symbol) = row.summary, _style(setting, row.method)
        assert summary is not None  # of `done`
        traces.append(
            go.Scatter(
                x=[value],
                y=[summary.mean],
                error_y={"array": [summary.high - summary.mean], "arrayminus": [summary.mean - summary.low]},
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 11},
                name=_name(row.label),
                hovertemplate=f"{name} %{{x}}<br>{setting.metric} {summary.mean:.3f}, 95 % CI {summary.low:.3f} to "
                f"{summary.high:.3f}, {row.n_seeds} seeds",
            )
        )
    return traces


def _parameters(setting: Setting) -> go.Figure:
    trained = [row for row in setting.done if row.costs["trainable"] > 0]
    figure = _figure(
        "trainable parameters", f"{setting.metric}, 95 % interval", len(setting.done), log_x=bool(trained)
    )
    for row in setting.done:
        if (
            row.costs["trainable"] == 0 and row.summary is not None
        ):  # the untrained base, which a logarithmic axis has no place for
            figure.add_hrect(y0=row.summary.low, y1=row.summary.high, fillcolor="#777", opacity=0.15, line_width=0)
            figure.add_hline(y=row.summary.mean, line_dash="dash", line_color="#555", annotation_text=_name(row.label))
    figure.add_traces(_points(setting, trained, [row.costs["trainable"] for row in trained], "parameters"))
    return figure


def _cost(setting: Setting) -> go.Figure:
    known = {title: [row for row in setting.done if not math.isnan(row.costs[key])] for title, key in _COSTS.items()}
    titles = [title for title, rows in known.items() if rows]
    figure = _figure(titles[0], f"{setting.metric}, 95 % interval", len(known[titles[0]]))
    owners = []
    for title in titles:
        rows = known[title]
        figure.add_traces(_points(setting, rows, [row.costs[_COSTS[title]] for row in rows], title.split(",")[0]))
        owners += [title] * len(rows)
    for trace, owner in zip(figure.data, owners, strict=True):
        trace.visible = owner == titles[0]
    buttons = [
        {
            "label": title,
            "method": "update",
            "args": [{"visible": [owner == title for owner in owners]}, {"xaxis.title.text": title}],
        }
        for title in titles
    ]
    figure.update_layout(
        updatemenus=[{"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}], margin_t=80
    )
    return figure


def _pairs(setting: Setting) -> go.Figure:
    labels = [row.label for row in setting.done]
    short = [_name(label if len(label) <= 28 else label[:27] + "…") for label in labels]
    gap: list[list[float | None]] = [[None] * len(labels) for _ in labels]
    text = [[""] * len(labels) for _ in labels]
    hover = [[""] * len(labels) for _ in labels]
    for pair in setting.comparisons:
        for one, other, sign in ((pair.first, pair.second, 1), (pair.second, pair.first, -1)):
            i, j = labels.index(one), labels.index(other)
            gap[i][j] = sign * pair.difference
            text[i][j] = "tie" if pair.tie else f"{sign * pair.difference:+.3f}"
            said = f"p = {pair.p:.3g}, {pair.p_holm:.3g} after Holm ({pair.test})"
            low, high = sorted((sign * pair.low, sign * pair.high))
            hover[i][j] = (
                f"{_name(one)} less {_name(other)}: {sign * pair.difference:+.3f}<br>"
                f"95 % interval, not corrected: {low:+.3f} to {high:+.3f}<br>{_name(said)}"
            )
    widest = max((abs(pair.difference) for pair in setting.comparisons if not math.isnan(pair.p)), default=1) or 1
    figure = _figure("", "", 0)
    figure.add_trace(
        go.Heatmap(
            z=gap,
            x=list(range(len(labels))),
            y=list(range(len(labels))),
            text=text,
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
            texttemplate="%{text}" if len(labels) <= 12 else None,
            colorscale="RdBu",
            zmin=-1.6 * widest,  # pale enough for dark text
            zmax=1.6 * widest,
            colorbar={"title": "row less column", "title_side": "right", "thickness": 12},
        )
    )
    ticks = {"tickvals": list(range(len(labels))), "ticktext": short, "showgrid": False, "zeroline": False}
    figure.update_xaxes(**ticks, automargin=True, tickangle=-45)
    figure.update_yaxes(**ticks, automargin=True, autorange="reversed")
    figure.update_layout(height=320 + 24 * len(labels))
    return figure


def _rates(setting: Setting) -> go.Figure:
    lines = list(setting.sweep.groupby(["method", "variant"], sort=False))
    figure = _figure("learning rate", f"{setting.metric} ± standard error", len(lines), log_x=True)
    figure.update_xaxes(exponentformat="power", dtick="D2")
    for (method, variant), part in lines:
        part = part.sort_values("learning_rate")
        colour, symbol = _style(setting, method)
        figure.add_trace(
            go.Scatter(
                x=part["learning_rate"].tolist(),
                y=part["score"].tolist(),
                error_y={"array": part["stderr"].tolist(), "thickness": 1},
                mode="lines+markers",
                line={"color": colour, "width": 1.5},
                marker={"symbol": symbol, "size": [13 if chosen else 7 for chosen in part["chosen"]]},
                name=_name(f"{method}, {variant}" if variant else method),
                hovertemplate="rate %{x:g}: %{y:.3f}",
            )
        )
    return figure


def _losses(setting: Setting) -> go.Figure:
    rows = [row for row in setting.done if row.losses]
    figure = _figure("step", "training loss", len(rows))
    for row in rows:
        colour, _ = _style(setting, row.method)
        for number, (seed, loss) in enumerate(row.losses.items()):
            figure.add_trace(
                go.Scatter(
                    x=[step for step, _ in loss],
                    y=[value for _, value in loss],
                    mode="lines" if len(loss) > 1 else "markers",
                    line={"color": colour, "width": 1.3},
                    name=_name(row.label),
                    legendgroup=_name(row.label),
                    showlegend=number == 0,
                    hovertemplate=f"seed {seed}, step %{{x}}: %{{y:.4f}}",
                )
            )
    return figure


def _curve(setting: Setting, name: str) -> go.Figure:
    rows = [row for row in setting.done if name in row.curves]
    figure = _figure("step", CURVES[name], len(rows))
    for row in rows:
        colour, _ = _style(setting, row.method)
        lines = [(f"seed {seed}", points, 0.8, 0.35) for seed, points in row.curves[name].items()]
        lines.append(("mean", mean_curve(row.curves[name]), 2.5, 1.0))
        for label, points, width, opacity in lines if len(lines) > 2 else lines[-1:]:
            figure.add_trace(
                go.Scatter(
                    x=[step for step, _ in points],
                    y=[value for _, value in points],
                    mode="lines",
                    line={"color": colour, "width": width},
                    opacity=opacity,
                    name=_name(row.label),
                    legendgroup=_name(row.label),
                    showlegend=label == "mean",
                    hovertemplate=f"{label}, step %{{x}}: %{{y:.3f}}",
                )
            )
    return figure


def _frontier(setting: Setting, points: list[Point]) -> go.Figure:
    figure = _figure(points[0].axis, f"gain in {setting.metric}", len(points))
    best = sorted((point for point in points if point.best), key=lambda point: point.loss)
    figure.add_trace(
        go.Scatter(
            x=[point.loss for point in best],
            y=[point.gain for point in best],
            mode="lines",
            line={"color": "#777", "dash": "dot", "shape": "hv"},
            name="no other row gains more and loses less",
            hoverinfo="skip",
        )
    )
    for point in points:
        colour, symbol = _style(setting, point.method)
        figure.add_trace(
            go.Scatter(
                x=[point.loss],
                y=[point.gain],
                error_x={"array": [None if math.isnan(point.loss_error) else point.loss_error]},
                error_y={"array": [point.gain_error]},
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 11},
                name=_name(point.label),
            )
        )
    return figure
