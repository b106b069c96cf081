"""The report: run folders and evaluations become one page."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from imagen_lightning.errors import counted
from imagen_lightning.report import comparable, evaluations, figures, sweeps
from imagen_lightning.report.comparable import TRAIN_LOSS, VAL_LOSS, Yardstick
from imagen_lightning.report.differences import differing
from imagen_lightning.report.figures import Style
from imagen_lightning.report.markup import Html, element, join, number
from imagen_lightning.report.page import Cell, Column, Page, Section, bullets, details, table
from imagen_lightning.report.runs import Measurement, Run
from imagen_lightning.report.samples import Drawer, add_grid, drawer_kinds
from imagen_lightning.report.sources import Sources
from imagen_lightning.report.values import protocol_list, value_cell, value_hint, value_title

MOST_IMAGES = 3000
MOST_BYTES = 24 << 20  # of a page for pictures
_FEW = 6  # configurations, of which each gets a column


def build(sources: Sources, most_bytes: int = MOST_BYTES) -> Page:
    """Makes the page of what was read.

    Args:
        sources: from `read_sources`.
        most_bytes: of the page that pictures of samples may take.
    """
    parts = (
        counted(len(sources.sweeps), "sweep") if sources.sweeps else "",
        counted(len(sources.runs), "run") if sources.runs else "",
        counted(len(sources.evaluations), "evaluation") if sources.evaluations else "",
        counted(len(sources.samples), "folder") + " of samples" if sources.samples else "",
    )
    page = Page(sources.title, ", ".join(part for part in parts if part))
    styles = figures.styles([run.name for run in sources.runs])
    drawn = list(zip(styles, sources.runs))
    yardsticks = comparable.distinct([comparable.yardstick(run) for run in sources.runs])
    sweeps.add(page, sources.sweeps)
    first = page.section("Runs" if sources.runs else "Summary", "runs")
    if sources.sweeps and sources.runs:
        first.add(element("p", "Of a sweep the best trials.", class_="hint"))
    _verdicts(first, sources)
    place_of_problems = len(first.parts)
    if drawn:
        _runs(first, drawn, yardsticks)
    evaluations.add(page, sources.evaluations, sources.problems)
    _samples(page, sources, drawn, most_bytes)
    groups = _groups(drawn, yardsticks)
    if any(run.curves or run.measurements for run in sources.runs):
        _losses(page, groups)
        _levels(page, groups)
        _metrics(page, drawn, yardsticks)
    if len(drawn) > 1:
        _differences(page, drawn)
    _environment(page, sources, drawn)
    # Reading pictures may have found more of them.
    if sources.problems.lines:
        first.parts.insert(place_of_problems, _problems(sources.problems.lines))
    return page


def _problems(lines: Sequence[str]) -> Html:
    head = f"{counted(len(lines), 'file or folder')} could not be used in full:"
    return element("div", element("strong", head), bullets(lines), class_="notice problem")


def _verdicts(section: Section, sources: Sources) -> None:
    found = [(item.name, item.evaluation.verdict) for item in sources.evaluations if item.evaluation.verdict]
    found += [(run.name, sentence) for run in sources.runs for sentence in run.verdict or []]
    if found:
        lines = [join(element("strong", f"{name}: "), text) for name, text in found]
        section.add(element("div", *(element("p", line) for line in lines), class_="notice verdict"))


# ---- runs


def _runs(section: Section, drawn: Sequence[tuple[Style, Run]], yardsticks: Sequence[Yardstick]) -> None:
    values = [comparable.last_values(run, measured) for (_, run), measured in zip(drawn, yardsticks)]
    columns = comparable.value_columns(values, comparable.OF_THE_MODEL)
    all_runs = element("input", type="checkbox", checked=True, data_all=True, aria_label="Show all runs")
    skipped = any(run.num_skipped for _, run in drawn)
    head = [
        Column("Run", "Ticked runs are drawn in figures and samples", before=all_runs),
        Column("Stage"),
        Column("Steps", "Optimizer steps behind the last number that was logged", numeric=True),
        *(Column(value_title(column), value_hint(column), numeric=True) for column in columns),
        Column("Images/s", "Median of what was logged, on the machine of the run", numeric=True),
        *([Column("Skipped", "Samples that could not be used", numeric=True)] if skipped else []),
    ]
    rows = []
    for place, (style, run) in enumerate(drawn):
        tick = element("input", type="checkbox", checked=True, data_run=style.identity)
        rows.append(
            [
                Cell(element("label", tick, style.swatch(), element("span", run.name), class_="run"), run.name),
                comparable.stage_words(run) if run.config else Cell("unknown", None),
                Cell(number(run.num_steps), run.num_steps),
                *(value_cell(column, place) for column in columns),
                _speed(run),
                *([Cell(number(run.num_skipped), run.num_skipped)] if skipped else []),
            ]
        )
    section.add(table(head, rows, caption="A title sorts; unticked runs are left out of figures and samples"))
    section.add(protocol_list(columns, comparable.OF_THE_MODEL))


def _speed(run: Run) -> Cell:
    curve = run.curves.get("throughput/images_per_second")
    if curve is None:
        return Cell("–")
    median = float(sorted(curve.values)[len(curve.values) // 2])
    return Cell(number(median, 3), median)


def _groups(
    drawn: Sequence[tuple[Style, Run]], yardsticks: Sequence[Yardstick]
) -> list[tuple[str, list[tuple[Style, Run]]]]:
    """Runs whose losses may stand together, with what they share as a title."""
    groups: dict[str, tuple[str, list[tuple[Style, Run]]]] = {}
    for item, measured in zip(drawn, yardsticks):
        groups.setdefault(measured.key, (measured.label, []))[1].append(item)
    return list(groups.values())


def _losses(page: Page, groups: Sequence[tuple[str, list[tuple[Style, Run]]]]) -> None:
    section = page.section("Loss", "loss")
    section.add(
        element(
            "p",
            "Runs whose losses are measured alike share a figure. The strong line is smoothed over 2% of the run.",
            class_="hint",
        )
    )
    for label, runs in groups:
        shown = []
        for metric, title in ((TRAIN_LOSS, "Training loss"), (VAL_LOSS, "Validation loss")):
            found = [(style, run.curves[metric]) for style, run in runs if metric in run.curves]
            if found:
                smoothed = any(len(curve.steps) >= figures.MIN_SMOOTHED for _, curve in found)
                switches = ["log", *(["raw"] if smoothed else [])]
                off = ["raw"] if len(found) > figures.MOST_NAMED else []
                shown.append(page.plot(figures.curves(found), title, switches=switches, off=off))
        section.add(element("h4", label), element("div", *shown, class_="plots"))


_LEVELS = {"val": "means of the last validation", "train": "means over the training steps of the last interval"}


def _levels(page: Page, groups: Sequence[tuple[str, list[tuple[Style, Run]]]]) -> None:
    kinds = (
        ("loss_t", "Loss by noise level", "t: 0 is data, 1 is noise"),
        ("loss_aug", "Loss by augmentation level", "augmentation level of the low-resolution input"),
    )
    boxes = []
    for label, runs in groups:
        shown = []
        for level, title, x_title in kinds:
            figure = figures.by_level(runs, level, x_title)
            if figure is not None:
                found = {part for _, run in runs if (part := figures.level_part(run, level)) is not None}
                note = ", ".join(_LEVELS[part] for part in sorted(found))
                shown.append(page.plot(figure, title, note[0].upper() + note[1:], switches=["log"]))
        if shown:
            boxes += [element("h4", label), element("div", *shown, class_="plots")]
    if boxes:
        section = page.section("Noise levels", "levels")
        section.add(*boxes)


def _metrics(page: Page, drawn: Sequence[tuple[Style, Run]], yardsticks: Sequence[Yardstick]) -> None:
    """A figure for each metric and protocol; intervals where they are known."""
    groups: dict[tuple[str, str], dict[int, tuple[Style, list[Measurement]]]] = {}
    labels: dict[tuple[str, str], str] = {}
    for number_, ((style, run), measured) in enumerate(zip(drawn, yardsticks)):
        protocol, digest = None, ""
        for item in comparable.measurements(run, measured):
            if item.value.protocol is not protocol:  # those of metrics.csv share one
                protocol, digest = item.value.protocol, item.value.protocol.key(comparable.OF_THE_MODEL)
            key = item.value.metric, digest
            groups.setdefault(key, {}).setdefault(number_, (style, []))[1].append(item)
            labels.setdefault(key, measured.label)
    if not groups:
        return
    section = page.section("Metrics", "metrics")
    shown = []
    for key, runs in sorted(groups.items(), key=lambda item: ("," in item[0][0], item[0][0])):
        alone = sum(metric == key[0] for metric, _ in groups) == 1
        title = key[0] if alone else f"{key[0]}, {labels[key]}"
        shown.append(page.plot(figures.measurements(list(runs.values())), title, switches=["log"]))
    section.add(element("div", *shown, class_="plots"))


# ---- samples


def _samples(page: Page, sources: Sources, drawn: Sequence[tuple[Style, Run]], most_bytes: int) -> None:
    drawers = [Drawer(style.identity, run.name, run.samples) for style, run in drawn if run.samples]
    drawers += [Drawer("", found.name, [found.samples]) for found in sources.samples]
    if not drawers:
        return
    section = page.section("Samples", "samples")
    section.add(element("p", "Images in one row have the same caption and the same noise.", class_="hint"))
    kinds = drawer_kinds(drawers)
    for title, alike in kinds:
        share = len(alike) / len(drawers)
        add_grid(section, title, alike, sources.problems, int(MOST_IMAGES * share), int(most_bytes * share))


# ---- configuration and environment


def _differences(page: Page, drawn: Sequence[tuple[Style, Run]]) -> None:
    section = page.section("Configuration", "configuration")
    known = [(style, run) for style, run in drawn if run.config]
    kinds: dict[str, list[tuple[Style, Run]]] = {}
    for style, run in known:
        model = run.config.get("model")
        kinds.setdefault(str(model.get("class_path")) if isinstance(model, Mapping) else "", []).append((style, run))
    for found in kinds.values():
        if len(found) > 1:
            section.add(_difference_table(found))
    if len(kinds) > 1:
        section.add(
            details("Between runs of different stages", _difference_table(known), opened=len(kinds) == len(known))
        )
    if len(known) < 2:
        section.add("Fewer than two runs have a configuration that can be read.")


def _difference_table(runs: Sequence[tuple[Style, Run]]) -> Html:
    found = differing([run.config for _, run in runs])
    names = ", ".join(run.name for _, run in runs) if len(runs) <= _FEW else counted(len(runs), "run")
    if not found:
        return element("p", f"The configurations of {names} are the same.")
    caption = (
        f"{counted(len(found), 'entry') if len(found) == 1 else f'{len(found)} entries'} that differ between {names}"
    )
    titles = [join(style.swatch(), " ", run.name) for style, run in runs]
    if len(runs) <= _FEW:
        head = [Column("Entry"), *(Column(title, sortable=False) for title in titles)]
        rows = [[element("code", key), *(_long(value) for value in values)] for key, values in found.items()]
        rows = [[Cell(row[0], key), *row[1:]] for key, row in zip(found, rows)]
        return table(head, rows, caption=caption)
    head = [Column("Run"), *(Column(element("code", key)) for key in found)]
    rows = [
        [Cell(title, run.name), *(_long(values[place]) for values in found.values())]
        for place, (title, (_, run)) in enumerate(zip(titles, runs))
    ]
    return table(head, rows, caption=caption)


def _long(text: str) -> Cell:
    return Cell(text if len(text) <= 80 else f"{text[:79]}…", text, None if len(text) <= 80 else text[:2000])


def _environment(page: Page, sources: Sources, drawn: Sequence[tuple[Style, Run]]) -> None:
    section = page.section("Environment", "environment")
    facts: list[tuple[Any, str, Mapping[str, Any]]] = []
    for style, run in drawn:
        trainer = run.config.get("trainer")
        more = {key: trainer.get(key) for key in ("precision", "devices")} if isinstance(trainer, Mapping) else {}
        facts.append((join(style.swatch(), " ", run.name), run.name, {**run.info, **more}))
    for found in sources.evaluations:
        more = {"created": found.evaluation.created, "cascade": found.evaluation.cascade}
        facts.append((found.name, found.name, {**found.evaluation.environment, **more}))
    flat = [_facts(content) for _, _, content in facts]
    names = [name for name in dict.fromkeys(name for item in flat for name in item) if name != "command"]
    head = [Column("Run or evaluation"), *(Column(name) for name in names)]
    rows = [
        [Cell(title, name), *(_fact(key, item.get(key)) for key in names)]
        for (title, name, _), item in zip(facts, flat)
    ]
    if rows:
        section.add(table(head, rows, caption="Where the numbers come from"))
    commands = [(name, item["command"]) for (_, name, _), item in zip(facts, flat) if "command" in item]
    if commands:
        lines = [join(element("strong", f"{name}: "), element("code", command)) for name, command in commands]
        section.add(details("Commands", bullets(lines)))
    folders = [run.folder for _, run in drawn] + [found.folder for found in (*sources.evaluations, *sources.samples)]
    section.add(details("Folders", bullets([element("code", str(folder)) for folder in folders])))


_OMITTED = ("wandb_id",)


def _facts(content: Mapping[str, Any]) -> dict[str, str]:
    """What says where numbers come from, one level deep, in words."""
    found: dict[str, str] = {}
    for key, value in content.items():
        if key in _OMITTED or value is None:
            continue
        if isinstance(value, Mapping):
            found |= {str(name): str(item) for name, item in value.items() if not isinstance(item, Mapping | list)}
        elif isinstance(value, list):
            found[key] = shlex.join(str(item) for item in value)
        else:
            found[key] = str(value)
    return found


def _fact(name: str, value: str | None) -> Cell:
    if value is None:
        return Cell("–")
    if name == "git":
        revision, dash, _ = value.partition("-")
        shown = join(element("code", revision[:10]), " with changes" if dash else "")
        return Cell(shown, value, value)
    return Cell(value.replace("T", " ")[:16] if name == "created" else value, value)
