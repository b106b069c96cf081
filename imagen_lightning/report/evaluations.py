"""The part of a report on evaluations: their rows, Pareto plots of sweeps, and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from imagen_lightning.catalog import CAPTIONS, IMAGES, compares
from imagen_lightning.errors import counted
from imagen_lightning.evaluation.schema import Row
from imagen_lightning.metrics.protocol import MADE, Value, is_made, setting_title
from imagen_lightning.report import figures
from imagen_lightning.report.comparable import ValueColumn, value_columns
from imagen_lightning.report.markup import Html, element, number
from imagen_lightning.report.page import Cell, Column, Page, Section, details, encode, image, table
from imagen_lightning.report.runs import Problems, read_value
from imagen_lightning.report.sample_sets import open_picture
from imagen_lightning.report.sources import FoundEvaluation
from imagen_lightning.report.values import protocol_list, value_cell, value_hint, value_title

MOST_PICTURES = 24
PICTURE_SIDE = 1200  # px
CATEGORY = "category"
_ALWAYS_SHOWN = ("guidance", "steps", "sampler", "aug_level", "seed")
GIVEN = {"real": "real low-res", "generated": "generated low-res", "chain": "whole cascade"}


@dataclass(frozen=True)
class Line:
    """A row of an evaluation with its values read."""

    source: FoundEvaluation
    row: Row
    values: tuple[Value, ...]


def add(page: Page, found: Sequence[FoundEvaluation], problems: Problems) -> None:
    """Adds the sections on evaluations where there are any."""
    lines = [_line(source, row, problems) for source in found for row in source.evaluation.rows]
    if not lines:
        return
    section = page.section("Evaluation", "evaluation")
    whole = [line for line in lines if CATEGORY not in line.row.settings]
    for alike in _groups(whole):
        names = dict.fromkeys(line.source.name for line in alike)
        section.add(element("h3", ", ".join(names)), *_table(alike, several=len(names) > 1))
    for source in found:
        parts = [line for line in lines if line.source is source and CATEGORY in line.row.settings]
        if parts:
            section.add(element("h3", f"{source.name}, by category"), *_by_category(parts))
    lines = whole
    _pictures(section, lines, problems)
    _pareto(page, lines)


def _groups(lines: Sequence[Line]) -> list[list[Line]]:
    """Evaluations of one kind that share a metric and its protocol, hence a column, stand in one table."""
    groups: list[tuple[set[str], list[Line]]] = []
    for source in dict.fromkeys(line.source.folder for line in lines):
        own = [line for line in lines if line.source.folder == source]
        kind = own[0].source.evaluation.kind
        keys = {f"{kind} {value.protocol.key(MADE)}" for line in own for value in line.values}
        touched = [group for group in groups if group[0] & keys]
        groups = [group for group in groups if not group[0] & keys]
        groups.append((keys.union(*(group[0] for group in touched)), [*(i for g in touched for i in g[1]), *own]))
    return [group for _, group in groups]


def _line(source: FoundEvaluation, row: Row, problems: Problems) -> Line:
    values = (_value(content, source, row, problems) for content in row.values)
    return Line(source, row, tuple(value for value in values if value is not None))


def _value(content: Mapping[str, Any], source: FoundEvaluation, row: Row, problems: Problems) -> Value | None:
    try:
        return read_value(dict(content))
    except (TypeError, ValueError) as error:
        problems.add(source.folder, f"a value of {row.stage} is left out: {error}")
        return None


def _table(lines: Sequence[Line], several: bool) -> list[Html]:
    """The whole metrics of the lines, and parts of metrics folded away."""
    names, compared = _compared(lines)
    columns = value_columns([line.values for line in lines], compared)
    head = [
        *([Column("Evaluation")] if several else []),
        Column("Stage"),
        Column("Given", "What a super-resolution stage enlarged"),
    ]
    rows = [
        [
            *([line.source.name] if several else []),
            line.row.stage,
            Cell(GIVEN.get(line.row.input or "", "–"), line.row.input),
        ]
        for line in lines
    ]
    # A sweep's rows are told apart by their settings, a matrix's by their stages.
    first = lines[0].source.evaluation.kind == "sweep"
    settings = [Column(setting_title(name).capitalize()) for name in names]
    costs = [Column("s/image", "Seconds of sampling", numeric=True), Column("Memory", "Peak of sampling", numeric=True)]
    if first:
        head += settings
        rows = [[*row, *_settings(line, names)] for row, line in zip(rows, lines)]
    whole = [column for column in columns if not column.is_part]
    parts = [column for column in columns if column.is_part]
    body = [
        [*row, *_cells(whole, place), *_costs(lines[place]), *([] if first else _settings(lines[place], names))]
        for place, row in enumerate(rows)
    ]
    titles = [*head, *_titles(whole), *costs, *([] if first else settings)]
    made = [
        table(titles, body, caption=f"{counted(len(rows), 'row')}; a title sorts"),
        protocol_list(columns, names),
    ]
    if parts:
        body = [[*row, *_cells(parts, place)] for place, row in enumerate(rows)]
        made.append(details("Parts of metrics", table([*head, *_titles(parts)], body, caption="Parts of metrics")))
    return made


def _compared(lines: Sequence[Line]) -> tuple[list[str], list[str]]:
    """Return the settings that a table shows next to its values, and those that may differ within a column of it.

    The latter are all in which the rows differ, real images too, which have none; how images are measured is never one.
    Stages differ in much that says nothing of a row: the rest is shown where it differs between rows of one stage.
    """
    by_place: dict[tuple[str, str | None], list[Mapping[str, Any]]] = {}
    for line in lines:
        by_place.setdefault((line.row.stage, line.row.input), []).append(line.row.settings)
    of_alike = {name for rows in by_place.values() for name in figures.settings_that_vary(rows)}
    differ = figures.settings_that_vary([line.row.settings for line in lines])
    return [name for name in differ if name in (*_ALWAYS_SHOWN, *of_alike)], [name for name in differ if is_made(name)]


def _by_category(lines: Sequence[Line]) -> list[Html]:
    """The parts of one set of prompts, each with its number of captions, in which alone their values differ."""
    shown = [replace(line, values=tuple(_of_the_set(value) for value in line.values)) for line in lines]
    names, compared = _compared(shown)
    names = [name for name in names if name != CATEGORY]
    columns = value_columns([line.values for line in shown], compared)
    settings = [Column(setting_title(name).capitalize()) for name in names]
    rows = [
        [
            str(line.row.settings[CATEGORY]),
            max((value.protocol.num_samples or 0 for value in line.values), default=0),
            *_settings(line, names),
            *_cells(columns, place),
        ]
        for place, line in enumerate(lines)
    ]
    head: list[Column | str] = ["Category", Column("Captions", numeric=True), *settings, *_titles(columns)]
    return [table(head, rows, caption=f"{counted(len(rows), 'row')}; a title sorts"), protocol_list(columns, names)]


def _of_the_set(value: Value) -> Value:
    """The value without what tells a part of a set of prompts from the others."""
    return replace(value, protocol=replace(value.protocol, num_samples=None, prompts=None))


def _settings(line: Line, names: Sequence[str]) -> list[Cell]:
    values = [line.row.settings.get(name) for name in names]
    return [Cell(figures.setting(value), None if value is None else figures.setting(value)) for value in values]


def _titles(columns: Sequence[ValueColumn]) -> list[Column]:
    return [Column(value_title(column), value_hint(column), numeric=True) for column in columns]


def _cells(columns: Sequence[ValueColumn], place: int) -> list[Cell]:
    return [value_cell(column, place) for column in columns]


def _costs(line: Line) -> list[Cell]:
    memory, seconds = line.row.peak_memory_bytes, line.row.seconds_per_image
    shown = "–" if memory is None else f"{memory / 2**20:,.0f} MiB"
    return [Cell(number(seconds, 3), seconds), Cell(shown, memory)]


def _place(line: Line) -> tuple[str, str, str]:
    return line.source.name, line.row.stage, GIVEN.get(line.row.input or "", "")


def _pictures(section: Section, lines: Sequence[Line], problems: Problems) -> None:
    shown = []
    wanted = [line for line in lines if line.row.samples]
    for line in wanted[:MOST_PICTURES]:
        picture = open_picture(Path(line.source.folder, str(line.row.samples)), problems.add)
        if picture is None:
            continue
        alike = [other for other in wanted if _place(other) == _place(line)]
        label = figures.labels([other.row.settings for other in alike])[alike.index(line)]
        words = *_place(line), label
        title = ", ".join(word for word in words if word)
        shown.append(details(title, image(encode(picture, PICTURE_SIDE), f"Samples of {title}")))
    if shown:
        more = len(wanted) - MOST_PICTURES
        note = element("p", f"Pictures of {more} more rows are not on this page.", class_="hint") if more > 0 else ""
        section.add(element("h3", "Pictures"), *shown, *([note] if note else []))


def _pareto(page: Page, lines: Sequence[Line]) -> None:
    """Plots of two metrics against each other, for what was measured alike."""
    sweeps: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if line.source.evaluation.kind == "sweep":
            sweeps.setdefault((line.source.name, line.row.stage), []).append(line)
    styles = figures.styles([f"{name}: {stage}" for name, stage in sweeps])
    plots: dict[tuple[str, str, str, str], list[tuple[figures.Style, list[figures.Point]]]] = {}
    for style, ((_, _), own) in zip(styles, sweeps.items()):
        _, compared = _compared(own)
        pairs: dict[tuple[str, str, str, str], list[figures.Point]] = {}
        for line, label in zip(own, figures.labels([line.row.settings for line in own])):
            aligned = [value for value in line.values if compares(value.metric) == CAPTIONS]
            faithful = [value for value in line.values if compares(value.metric) == IMAGES]
            for x, y in product(aligned, faithful):
                key = x.metric, y.metric, x.protocol.key(compared), y.protocol.key(compared)
                pairs.setdefault(key, []).append(figures.Point(x, y, label))
        for key, points in pairs.items():
            plots.setdefault(key, []).append((style, points))
    if not plots:
        return
    section = page.section("Pareto", "pareto")
    note = (
        "The line joins the operating points that no other beats. Bars are intervals; a double click shows them whole."
    )
    section.add(element("p", note, class_="hint"))
    for (x_metric, y_metric, *_), found in plots.items():
        names = ", ".join(dict.fromkeys(style.name for style, _ in found))
        section.figure(figures.pareto(found), f"{y_metric} against {x_metric}", names, height=460)
