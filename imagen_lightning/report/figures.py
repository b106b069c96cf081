"""A report's figures, made by plotly; colours of text and grid are the page's, by its theme."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from imagen_lightning import catalog
from imagen_lightning.metrics.protocol import Value, setting_title
from imagen_lightning.report.curves import smooth, thin
from imagen_lightning.report.markup import Html, element, number
from imagen_lightning.report.runs import Curve, Measurement, Run

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Told apart on white and on black, and by most colour-blind readers together with the dashes.
COLOURS = (
    *("#3b82f6", "#e07b1a", "#10a37f", "#d6456b", "#8b5cf6"),
    *("#b08900", "#0ea5b7", "#c026a8", "#7a8b2f", "#8a8f98"),
)
DASHES = {"solid": None, "dash": "6 4", "dot": "2 3", "dashdot": "6 3 2 3", "longdash": "10 4"}
MOST_NAMED = 8  # runs in a legend; beyond, the pointer tells
MIN_SMOOTHED = 30  # points, below which a curve is shown as it is
_BIN = re.compile(r"(\d\.\d+)-(\d\.\d+)$")


@dataclass(frozen=True)
class Style:
    """How a run is drawn on every figure."""

    identity: str
    name: str
    colour: str
    dash: str

    def swatch(self) -> Html:
        """A short line as in the figures."""
        line = element(
            "line",
            **{"x1": 0, "y1": 5, "x2": 24, "y2": 5, "stroke": self.colour, "stroke-width": 3},
            **{"stroke-dasharray": DASHES[self.dash]},
        )
        return element("svg", line, class_="swatch", width=24, height=10, aria_hidden="true")


def styles(names: Sequence[str]) -> list[Style]:
    """One for each name, all different for as many as there are colours and dashes."""
    dashes = list(DASHES)
    return [
        Style(f"r{place}", name, COLOURS[place % len(COLOURS)], dashes[place // len(COLOURS) % len(dashes)])
        for place, name in enumerate(names)
    ]


def empty(x_title: str, *, named: bool, log_y: bool = False, y_title: str | None = None) -> go.Figure:
    """A figure without traces.

    Args:
        x_title: of the axis.
        named: whether it has a legend.
        log_y: begin with a logarithmic axis.
        y_title: of the axis.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.update_layout(
        template="none",
        margin={"l": 60, "r": 15, "t": 10, "b": 45},
        showlegend=named,
        legend={"orientation": "h", "y": -0.18, "yanchor": "top"},
        hovermode="closest",
        font={"family": "system-ui, sans-serif", "size": 12},
        xaxis={"title": {"text": x_title}, "automargin": True},
        yaxis={"automargin": True, "tickformat": "~g", "zeroline": False},
    )
    figure.update_yaxes(type="log" if log_y else "linear", nticks=3 if log_y else 6)  # 3 give 1, 2, 5, 10, …
    if y_title is not None:
        figure.update_yaxes(title={"text": y_title})
    return figure


def _trace(style: Style, x: Any, y: Any, kind: str, *, mode: str = "lines", **more: Any) -> go.Scatter:
    import plotly.graph_objects as go

    line = {"color": style.colour, "width": 1 if kind == "raw" else 2, "dash": style.dash}
    return go.Scatter(
        x=np.asarray(x),
        y=np.asarray(y, np.float32),
        mode=mode,
        name=plain(style.name),
        legendgroup=style.identity,
        line=line,
        opacity=0.3 if kind == "raw" else 1.0,
        meta={"run": style.identity, "kind": kind},
        hoverlabel={"namelength": -1},
        **more,
    )


def curves(runs: Sequence[tuple[Style, Curve]], x_title: str = "optimizer step") -> go.Figure:
    """Raw and smoothed curves over the steps of training; short ones as they are, with their points."""
    log_y = spans_decades(np.concatenate([curve.values for _, curve in runs]))
    figure = empty(x_title, named=1 < len(runs) <= MOST_NAMED, log_y=log_y)
    for style, curve in runs:
        raw = thin(curve)
        if len(curve.steps) < MIN_SMOOTHED:
            figure.add_trace(_trace(style, raw.steps, raw.values, "curve", mode="lines+markers"))
            continue
        figure.add_trace(_trace(style, raw.steps, raw.values, "raw", showlegend=False, hoverinfo="skip"))
        mean = thin(smooth(curve))
        figure.add_trace(_trace(style, mean.steps, mean.values, "curve"))
    return figure


def measurements(runs: Sequence[tuple[Style, Sequence[Measurement]]], x_title: str = "optimizer step") -> go.Figure:
    """A metric over the steps of training, with intervals where all of a run's values have one."""
    numbers = np.array([item.value.value for _, items in runs for item in items])
    figure = empty(x_title, named=1 < len(runs) <= MOST_NAMED, log_y=spans_decades(numbers))
    for style, items in runs:
        thinned = thin(Curve(np.array([item.step for item in items]), np.array([item.value.value for item in items])))
        kept = set(thinned.steps.tolist())
        values = [item.value for item in items if item.step in kept]
        few = len(kept) < MIN_SMOOTHED
        mode = "lines+markers" if few else "lines"
        bars = _bars(values, style) if few else None
        steps = [item.step for item in items if item.step in kept]
        figure.add_trace(_trace(style, steps, [value.value for value in values], "curve", mode=mode, error_y=bars))
    return figure


def spans_decades(values: np.ndarray) -> bool:
    """Whether positive values are better seen on a logarithmic axis."""
    finite = values[np.isfinite(values)]
    return bool(finite.size and finite.min() > 0 and finite.max() > 10 * finite.min())


def by_level(runs: Sequence[tuple[Style, Run]], level: str, x_title: str) -> go.Figure | None:
    """The loss in bins of a level: of validation, or of training (so named) where there is no validation.

    Args:
        runs: whose losses may stand together.
        level: "loss_t" or "loss_aug".
        x_title: what the level is.
    """
    found = []
    for style, run in runs:
        part = level_part(run, level)
        if part is not None:
            found.append((style, " (training)" if part == "train" else "", level_means(run, f"{part}/{level}/")))
    if not found:
        return None
    log_y = spans_decades(np.array([mean for _, _, bins in found for _, _, mean in bins]))
    figure = empty(x_title, named=1 < len(found) <= MOST_NAMED, log_y=log_y)
    for style, words, bins in found:
        trace = _trace(
            style,
            [(low + high) / 2 for low, high, _ in bins],
            [mean for _, _, mean in bins],
            "curve",
            mode="lines+markers",
            text=[f"{low:g} to {high:g}" for low, high, _ in bins],
            hovertemplate="%{text}: %{y:.4g}",
        )
        trace.name = plain(style.name + words)
        figure.add_trace(trace)
    return figure


def level_part(run: Run, level: str) -> str | None:
    """What a run's loss by level is of: "val", "train" where there is no validation, None where there is none."""
    return next((part for part in ("val", "train") if level_means(run, f"{part}/{level}/")), None)


def level_means(run: Run, prefix: str) -> list[tuple[float, float, float]]:
    """(low, high, mean) of each bin at the last step that has any, by rising level."""
    curves_ = {name: curve for name, curve in run.curves.items() if name.startswith(prefix) and _BIN.search(name)}
    if not curves_:
        return []
    step = max(curve.steps[-1] for curve in curves_.values())
    bins = []
    for name, curve in curves_.items():
        match = _BIN.search(name)
        if match is not None and curve.steps[-1] == step:
            bins.append((float(match[1]), float(match[2]), curve.last))
    return sorted(bins)


@dataclass(frozen=True)
class Point:
    """One operating point: its two values and what tells it from the others."""

    x: Value
    y: Value
    label: str


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that none beats in both values, by rising x."""
    x_sign, y_sign = (1 if catalog.higher_is_better(value.metric) else -1 for value in (points[0].x, points[0].y))

    def beats(one: Point, other: Point) -> bool:
        x, y = x_sign * (one.x.value - other.x.value), y_sign * (one.y.value - other.y.value)
        return x >= 0 and y >= 0 and (x > 0 or y > 0)

    front = [point for point in points if not any(beats(other, point) for other in points)]
    return sorted(front, key=lambda point: point.x.value)


def pareto(sweeps: Sequence[tuple[Style, Sequence[Point]]]) -> go.Figure:
    """Two metrics against each other, a point an operating point, those that none beats joined by a line."""
    first = sweeps[0][1][0]
    figure = empty(_axis(first.x.metric), named=len(sweeps) > 1, y_title=_axis(first.y.metric))
    figure.update_layout(margin={"t": 25})
    places = [point for _, points in sweeps for point in points]
    figure.update_xaxes(range=_range([point.x.value for point in places]))  # intervals may be far longer
    figure.update_yaxes(range=_range([point.y.value for point in places]))
    for style, points in sweeps:
        front = pareto_front(points)
        line = _trace(
            style, [p.x.value for p in front], [p.y.value for p in front], "front", showlegend=False, hoverinfo="skip"
        )
        figure.add_trace(line)
        ordered = sorted(points, key=lambda point: (point.x.value, point.y.value))
        corners = ("top right", "bottom right", "top left", "bottom left")  # in turn, so that fewer labels meet
        trace = _trace(
            style,
            [point.x.value for point in ordered],
            [point.y.value for point in ordered],
            "points",
            mode="markers+text" if len(points) <= 30 else "markers",
            text=[plain(point.label) for point in ordered],
            textposition=[corners[place % 4] for place in range(len(ordered))],
            textfont={"size": 11},
            hovertext=[_words(point) for point in ordered],
            hoverinfo="text",
            error_x=_bars([point.x for point in ordered], style),
            error_y=_bars([point.y for point in ordered], style),
        )
        trace.marker = {"size": 9, "color": style.colour}
        figure.add_trace(trace)
    return figure


def _range(values: Sequence[float]) -> list[float]:
    """Room for points and their labels."""
    finite = [value for value in values if np.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    room = 0.25 * (high - low) or 0.1 * abs(high) or 1.0
    return [low - room, high + room]


def _axis(metric: str) -> str:
    way = {True: " (higher is better)", False: " (lower is better)", None: ""}[catalog.higher_is_better(metric)]
    return f"{metric}{way}"


def _words(point: Point) -> str:
    return "<br>".join(plain(line) for line in (point.label, _value_words(point.x), _value_words(point.y)))


def _value_words(value: Value) -> str:
    interval = "" if value.low is None else f" ({number(value.low)} to {number(value.high)})"
    return f"{value.metric} {number(value.value)}{interval}"


def plain(text: str) -> str:
    """Text that plotly shows as it is: it would take tags in names and labels for its own markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _bars(values: Sequence[Value], style: Style) -> Mapping[str, Any]:
    if any(value.low is None or value.high is None for value in values):
        return {"visible": False}
    red, green, blue = bytes.fromhex(style.colour[1:])
    return {
        "type": "data",
        "symmetric": False,
        "array": [(value.high or 0.0) - value.value for value in values],
        "arrayminus": [value.value - (value.low or 0.0) for value in values],
        "thickness": 1,
        "width": 2,
        "color": f"rgba({red},{green},{blue},0.4)",
    }


def settings_that_vary(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings whose values are not the same in all rows."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if len({repr(row.get(name)) for row in rows}) > 1]


def labels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tells operating points apart, in few words: "guidance 2, steps 25"; of a setting a stage, what varies."""
    parts: list[list[str]] = [[] for _ in rows]
    for name in settings_that_vary(rows):
        values: list[Any] = [row.get(name) for row in rows]
        lists = [value for value in values if isinstance(value, list | tuple)]
        if len(lists) == len(values) and len({len(value) for value in lists}) == 1:
            stages = [column for column in zip(*lists) if len(set(map(repr, column))) > 1]
            values = list(zip(*stages))
        for part, value in zip(parts, values):
            part.append(f"{setting_title(name)} {setting(value)}")
    return [", ".join(part) for part in parts]


def setting(value: Any) -> str:
    """A setting's value: one, or one a stage where these differ."""
    if isinstance(value, list | tuple):
        parts = [setting(item) for item in value]
        return " / ".join(parts if len(set(parts)) > 1 else parts[:1])
    if value is None:
        return "–"
    return number(float(value)) if isinstance(value, float | int) and not isinstance(value, bool) else str(value)
