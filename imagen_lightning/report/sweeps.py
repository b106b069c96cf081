"""The part of a report on a sweep: its trials as a table and as lines, what mattered, and what seeds alone do."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imagen_lightning.errors import counted
from imagen_lightning.report import figures
from imagen_lightning.report.differences import words
from imagen_lightning.report.markup import Html, element, number
from imagen_lightning.report.page import Cell, Column, Page, Section, bullets, details, notice, table
from imagen_lightning.report.seeds import SEEDS, Group, groups, within
from imagen_lightning.report.studies import FoundSweep

if TYPE_CHECKING:
    import plotly.graph_objects as go

_MOST_LINES = 200  # trials in the parallel coordinates
_FEW = 6  # values of which each is a tick


def add(page: Page, sweeps: Sequence[FoundSweep]) -> None:
    """Adds a section for each sweep."""
    for sweep in sweeps:
        section = page.section(f"Sweep {sweep.name}" if len(sweeps) > 1 else "Sweep", f"sweep-{sweep.name}")
        states = {state: sum(trial.state == state for trial in sweep.trials) for state in _STATES}
        told = ", ".join(f"{count} {state}" for state, count in states.items() if count)
        better = "more" if sweep.maximize else "less"
        section.add(
            element(
                "p",
                f"{counted(len(sweep.trials), 'trial')}: {told}. {sweep.metric}: {better} is better.",
                class_="hint",
            )
        )
        for sentence in verdict(sweep):
            section.add(notice(sentence, "verdict"))
        if len(sweep.finished) > 1 and sweep.names:
            section.figure(
                parallel(sweep), "Trials", "A line a trial, the best one strong and dark; the pointer tells its values."
            )
        if sweep.importance:
            section.figure(
                importance(sweep),
                "What mattered",
                "Share of the metric's spread that a parameter alone explains among finished trials (PED-ANOVA).",
                height=80 + 40 * len(sweep.importance),
            )
        _groups_table(section, sweep)
        section.add(_trials_table(sweep))
        failed = [trial for trial in sweep.trials if trial.problem]
        if failed:
            lines = [element("span", f"trial {trial.number}: ", element("pre", trial.problem)) for trial in failed]
            section.add(details(f"{counted(len(failed), 'trial')} failed", bullets(lines)))


_STATES = ("finished", "pruned", "failed", "not finished")


def parallel(sweep: FoundSweep) -> go.Figure:
    """Parallel coordinates of finished trials: an upright axis a parameter and one for the metric, a line a trial.

    Lines of a plain figure, since plotly's own parallel coordinates need WebGL, which not every browser has.
    """
    import plotly.graph_objects as go
    from plotly.colors import sample_colorscale

    trials = sweep.finished[:_MOST_LINES]
    axes = [_axis(short(n), [trial.values.get(n) for trial in trials], sweep.scales.get(n)) for n in sweep.names]
    axes.append(_axis(sweep.metric, [trial.value for trial in trials]))
    figure = figures.empty("", named=False)
    shades = sample_colorscale("Viridis", [place / max(1, len(trials) - 1) for place in range(len(trials))])
    for place in reversed(range(len(trials))):  # the best on top
        trial = trials[place]
        told = [f"trial {trial.number}: {sweep.metric} {number(trial.value)}"]
        told += [f"{short(name)} {_text(trial.values.get(name))}" for name in sweep.names]
        figure.add_trace(
            go.Scatter(
                x=list(range(len(axes))),
                y=[axis.heights[place] for axis in axes],
                mode="lines+markers",
                line={"color": shades[place], "width": 3 if place == 0 else 1.5},
                marker={"size": 4},
                opacity=1.0 if place == 0 else 0.7,
                hovertext="<br>".join(map(figures.plain, told)),
                hoverinfo="text",
                showlegend=False,
            )
        )
    for place, axis in enumerate(axes):
        figure.add_shape(type="line", x0=place, x1=place, y0=0, y1=1, line={"color": "#8a8f98", "width": 1})
        for height, text in axis.ticks:
            figure.add_annotation(
                x=place,
                y=height,
                text=figures.plain(text),
                showarrow=False,
                xanchor="left",
                xshift=6,
                yshift=8,  # above a line that goes straight on
                font={"size": 11},
            )
    labels = [figures.plain(axis.label) for axis in axes]
    figure.update_xaxes(
        tickvals=list(range(len(axes))), ticktext=labels, side="top", showgrid=False, range=[-0.15, len(axes) - 0.6]
    )
    figure.update_yaxes(visible=False, range=[-0.06, 1.1])
    figure.update_layout(margin={"l": 20, "r": 60, "t": 40, "b": 10})
    return figure


@dataclass(frozen=True)
class Axis:
    """One upright axis: heights of the trials and of the ticks, from 0 to 1."""

    label: str
    heights: Sequence[float]
    ticks: Sequence[tuple[float, str]]


def _axis(label: str, values: Sequence[Any], scale: str | None = None) -> Axis:
    """An axis of numbers or of texts.

    Args:
        label: of the axis.
        values: by trial.
        scale: "log" or "linear", as the parameter was searched; None takes "log" for positive numbers over a factor of
            100.
    """
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        low, high = min(values), max(values)
        if low > 0 and (scale == "log" or (scale is None and high >= 100 * low)):
            logs = [math.log10(value) for value in values]
            first, span = min(logs), max(logs) - min(logs)
            decades = range(math.ceil(first - 1e-9), math.floor(max(logs) + 1e-9) + 1)
            ticks = [(float(tick), f"1e{tick}") for tick in decades]
            if len(ticks) < 2:
                ticks = [(math.log10(value), number(float(f"{value:.3g}"))) for value in dict.fromkeys((low, high))]
            heights = [(log - first) / span if span else 0.5 for log in logs]
            return Axis(f"{label} (log)", heights, [((at - first) / span if span else 0.5, text) for at, text in ticks])
        span = high - low
        heights = [(value - low) / span if span else 0.5 for value in values]
        kinds = sorted(set(values))
        if len(kinds) <= _FEW:
            return Axis(label, heights, [((kind - low) / span if span else 0.5, number(float(kind))) for kind in kinds])
        return Axis(label, heights, [(step / 4, number(float(f"{low + span * step / 4:.3g}"))) for step in range(5)])
    texts = [_text(value) for value in values]
    names = sorted(set(texts))
    last = max(1, len(names) - 1)
    return Axis(label, [names.index(text) / last for text in texts], [(n / last, name) for n, name in enumerate(names)])


def importance(sweep: FoundSweep) -> go.Figure:
    """Bars of the parameters' importance."""
    import plotly.graph_objects as go

    figure = figures.empty("share", named=False)
    items = sorted(sweep.importance.items(), key=lambda item: item[1])
    names = [figures.plain(short(name)) for name, _ in items]
    figure.add_trace(go.Bar(x=[share for _, share in items], y=names, orientation="h", marker={"color": "#3b82f6"}))
    figure.update_yaxes(type="category")
    figure.update_xaxes(range=[0, 1])
    return figure


def short(name: str) -> str:
    """The last parts of a parameter's name that say something."""
    parts = [part for part in name.split(".") if part not in ("init_args", "model")]
    return ".".join(parts[-2:])


def _text(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    return words(value) if not isinstance(value, dict) else words(value.get("class_path", json.dumps(value)))


def _trials_table(sweep: FoundSweep) -> Html:
    head = [
        Column("Trial", numeric=True),
        Column(sweep.metric, "The last value that was logged", numeric=True),
        *(Column(short(name), name) for name in sweep.names),
        Column("State"),
        Column("Seconds", numeric=True),
        Column("Folder"),
    ]
    rest = [trial for trial in sweep.trials if trial not in sweep.finished]
    rows = [
        [
            Cell(str(trial.number), trial.number),
            Cell(number(trial.value), trial.value),
            *(_cell(trial.values.get(name)) for name in sweep.names),
            Cell(trial.state, trial.state, trial.problem),
            trial.seconds,
            element("code", trial.folder.name),
        ]
        for trial in [*sweep.finished, *rest]
    ]
    return table(head, rows, caption="Trials, the best first")


def _cell(value: Any) -> Cell:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Cell(number(float(value)), float(value))
    return Cell(_text(value), _text(value))


def verdict(sweep: FoundSweep) -> list[str]:
    """What the sweep found, and whether the seeds explain it."""
    finished = sweep.finished
    if not finished:
        return []
    best = finished[0]
    made = [f"best {sweep.metric}: {number(best.value)}, trial {best.number} ({_settings(best.values, sweep.names)})"]
    ranked = groups(sweep)
    if not ranked and len(finished) > 1:
        made.append("no setting has two seeds: how much of the difference is chance cannot be told from these trials")
    if len(ranked) > 1:
        first, second = ranked[:2]
        names = [name for name in sweep.names if name not in SEEDS]
        said = (
            f"best mean over seeds: {number(first.mean)}{_plus(first)} at {_settings(first.values, names)}; "
            f"next {number(second.mean)}{_plus(second)} at {_settings(second.values, names)}: "
        )
        same = [group for group in ranked[1:] if within(first, group)]
        verdicts = {
            None: "a setting with one seed cannot be compared",
            True: "the difference is within the seeds' spread",
            False: "the difference is beyond the seeds' spread",
        }
        said += verdicts[within(first, second)]
        if len(same) > 1:
            said += f", as is that of {len(same) - 1} more"
        made.append(said)
    return made


def _plus(group: Group) -> str:
    return "" if group.half is None else f" ± {number(group.half, 2)}"


def _settings(values: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{short(name)} {_text(values.get(name))}" for name in names) or "as it is"


def _groups_table(section: Section, sweep: FoundSweep) -> None:
    ranked = groups(sweep)
    if not ranked:
        return
    names = [name for name in sweep.names if name not in SEEDS]
    head = [
        *(Column(short(name), name) for name in names),
        Column(f"Mean {sweep.metric}", numeric=True),
        Column("± 95%", "Half of the mean's confidence interval by Student's t", numeric=True),
        Column("Least", numeric=True),
        Column("Most", numeric=True),
        Column("Seeds", numeric=True),
        Column("From the best", "Welch's t test at 95%"),
    ]
    told = {None: "one seed: cannot be said", True: "within the seeds' spread", False: "beyond the seeds' spread"}
    rows = [
        [
            *(_cell(group.values.get(name)) for name in names),
            group.mean,
            group.half,
            min(group.metric),
            max(group.metric),
            len(group.metric),
            "the best" if group is ranked[0] else told[within(ranked[0], group)],
        ]
        for group in ranked
    ]
    if not names:
        head, rows = [Column("Setting"), *head], [["all", *row] for row in rows]
    section.add(table(head, rows, caption="Settings over their seeds"))
