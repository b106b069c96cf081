"""The page of a fine-tuning: what was learned, what was forgotten, what was copied, and what it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from imagen_lightning.catalog import is_percent
from imagen_lightning.errors import counted
from imagen_lightning.evaluation.schema import Row
from imagen_lightning.finetuning.evidence_schema import Evidence, Part
from imagen_lightning.finetuning.evidence_words import leak_words
from imagen_lightning.metrics.protocol import MADE, Value, setting_title
from imagen_lightning.report import figures
from imagen_lightning.report.comparable import value_columns
from imagen_lightning.report.evaluations import GIVEN
from imagen_lightning.report.finetuning_runs import add_cost
from imagen_lightning.report.markup import Html, element, join, measured, number
from imagen_lightning.report.page import Cell, Column, Page, Section, details, image, notice, table
from imagen_lightning.report.runs import Problems
from imagen_lightning.report.sample_sets import open_picture
from imagen_lightning.report.values import protocol_facts, protocol_list, value_cell, value_hint, value_title

SIDES = ("before", "after", "real")
CELL, GAP = 144, 8  # px of a picture on the page, and between pictures
_WORDS = {"better": "better", "worse": "worse", "alike": "alike", "unclear": "cannot tell"}
_COPYING = {
    "near copies": "Samples that lie nearer to a training image than all but 5% of held-out images, by distance and "
    "by its ratio to the mean distance to the nearest 50: near to one, not to all as blurred pictures are",
    "near by distance": "Samples nearer to a training image than all but 5% of held-out images; blurred pictures are "
    "near to all",
    "nearer than a held-out image": "How likely a sample lies nearer to the training images than a held-out image",
    "authenticity": "Samples that are farther from their nearest training image than that is from its own nearest",
}


def build(evidence: Evidence, folder: Path, problems: Problems) -> Page:
    """Makes the page.

    Args:
        evidence: what was found.
        folder: of its pictures.
        problems: takes note of pictures that are missing or broken.
    """
    page = Page("Fine-tuning", join(element("code", evidence.before), " → ", element("code", evidence.after)))
    first = page.section("Verdict", "verdict")
    first.add(notice(evidence.verdict, "verdict"))
    _sentences(first, evidence)
    place_of_problems = len(first.parts)
    for grid in evidence.grids:
        _grid(page.section(grid["title"], f"grid-{len(page.sections)}"), grid, folder, problems)
    _part(page.section("New domain", "new"), evidence.new)
    if evidence.old is None:
        forgetting = page.section("Forgetting", "old")
        forgetting.add(
            notice("What AFTER may have forgotten was not measured: give --before-data or --before-prompts.", "problem")
        )
    else:
        _part(page.section("What BEFORE could do", "old"), evidence.old)
    _copying(page.section("Copying", "copying"), evidence.copying, folder, problems)
    add_cost(page.section("Cost and origin", "cost"), evidence)
    _made(page.section("How this was made", "environment"), evidence.environment)
    if problems.lines:
        first.parts.insert(place_of_problems, notice("; ".join(problems.lines), "problem"))
    return page


def _sentences(section: Section, evidence: Evidence) -> None:
    lines = [("New domain", evidence.new.name, evidence.new.sentence)]
    if evidence.old is not None:
        lines.append(("Before", evidence.old.name, evidence.old.sentence))
    for title, name, sentence in lines:
        section.add(element("p", element("strong", f"{title}, "), element("code", name), ": ", sentence))
    if evidence.copying is not None:
        section.add(element("p", element("strong", "Copying: "), evidence.copying["sentence"]))
        if (warning := leak_words(evidence.copying)) is not None:
            section.add(notice(warning, "problem"))


# ---- pictures


def _grid(section: Section, grid: Mapping[str, Any], folder: Path, problems: Problems) -> None:
    """Before, after, and the real image of the caption where there is one, side by side."""
    sides = [side for side in SIDES if any(cell.get(side) for cell in grid["cells"])]
    section.add(
        element("p", f"{', '.join(sides)}, from left to right; the first two from the same noise.", class_="hint")
    )
    shown = [
        _figure(picture, f"{', '.join(sides)} of {cell['caption']}", cell["caption"])
        for cell in grid["cells"]
        if (picture := _row_of([cell.get(side) for side in sides], folder, problems)) is not None
    ]
    section.add(element("div", *shown, class_="pictures"))


def _row_of(names: Sequence[str | None], folder: Path, problems: Problems) -> Image.Image | None:
    """Pictures side by side on white; small ones are enlarged without smoothing. None where one is missing."""
    found = [None if name is None else open_picture(folder / name, problems.add) for name in names]
    if any(name is not None and picture is None for name, picture in zip(names, found)):
        return None
    canvas = Image.new("RGB", (len(found) * (CELL + GAP) - GAP, CELL), "white")
    for place, picture in enumerate(found):
        if picture is not None:
            small = max(picture.size) < CELL
            kind = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
            canvas.paste(picture.resize((CELL, CELL), kind), (place * (CELL + GAP), 0))
    return canvas


def _figure(picture: Image.Image, alt: str, caption: str) -> Html:
    """A picture with its caption, which is no wider."""
    return element("div", image(picture, alt, caption), style=f"max-width:{picture.width}px")


# ---- metrics


def _part(section: Section, part: Part) -> None:
    section.add(element("p", element("code", part.name), f", {counted(part.num, 'caption')}. ", part.sentence))
    if not part.differences:
        return
    section.add(_differences(part.differences))
    parts = [item for item in part.differences if "," in item["metric"]]
    if parts:
        section.add(details("Parts of metrics", _differences(parts, "Part of the whole cascade's metric")))
    tables = [_stage(before, after, part.real) for before, after in zip(part.before, part.after)]
    section.add(details("Every stage, with protocols", *(html for made in tables for html in made)))


def _stage(before: Row, after: Row, real: Sequence[Row]) -> list[Html]:
    """One stage on one kind of input: before, after, and the real images of its size."""
    rows = [("before", before), ("after", after)]
    values = [[Value.from_json(dict(value)) for value in row.values] for _, row in rows]
    sizes = {value.protocol.image_size for value in values[0]}
    for row in real:
        own = [Value.from_json(dict(value)) for value in row.values]
        if {value.protocol.image_size for value in own} == sizes:
            rows.append(("real images", row))
            values.append(own)
    # The real images were made by no settings: nothing is compared with them by how it was sampled.
    names = figures.settings_that_vary([before.settings, after.settings])
    columns = [column for column in value_columns(values, MADE) if not column.is_part]
    head: list[Column | str] = ["Images", *(Column(setting_title(name).capitalize()) for name in names)]
    head += [Column(value_title(column), value_hint(column), numeric=True) for column in columns]
    body = [
        [
            name,
            *(figures.setting(row.settings[key]) if key in row.settings else "–" for key in names),
            *(value_cell(column, place) for column in columns),
            Cell(number(row.seconds_per_image, 3), row.seconds_per_image),
        ]
        for place, (name, row) in enumerate(rows)
    ]
    given = f", given {GIVEN[before.input]}" if before.input in ("real", "generated") else ""
    title = f"{before.stage}{given}{', the whole cascade' if before.input == 'chain' else ''}"
    head.append(Column("s/image", "Seconds of sampling", numeric=True))
    return [element("h4", title), table(head, body, caption=title), protocol_list(columns, names)]


def _differences(found: Sequence[Mapping[str, Any]], title: str = "Metric of the whole cascade") -> Html:
    """The whole cascade's metrics before, after, and what changed; parts of metrics stand apart."""
    shown = [item for item in found if "," not in item["metric"]] or found
    head: list[Column | str] = [
        title,
        *(Column(title, numeric=True) for title in ("Before", "After", "Difference")),
        Column("Reading", "Better or worse where the interval of the difference excludes 0; alike where it is small"),
    ]
    rows = [
        [
            item["metric"],
            *(Cell(_shown(item["metric"], item[side]), _float(item[side])) for side in ("before", "after")),
            _difference(item),
            _WORDS[item["verdict"]] if item["low"] is not None else "no interval known",
        ]
        for item in shown
    ]
    intervals = dict.fromkeys(item["confidence"] for item in shown if item["confidence"])
    return table(head, rows, caption=f"After less before; intervals: {', '.join(intervals)}")


def _difference(item: Mapping[str, Any]) -> Cell:
    value = _float(item["value"])
    shown = _shown(item["metric"], item["value"], sign=True)
    if item["low"] is None:
        return Cell(shown, value)
    low, high = (_shown(item["metric"], item[key], sign=True) for key in ("low", "high"))
    return Cell(join(shown, element("span", f"{low} to {high}", class_="range")), value, item["confidence"])


def _shown(metric: str, value: Any, sign: bool = False) -> str:
    """A number for people: shares in percent, their differences in points."""
    plain = _float(value)
    text = f"{100 * plain:.1f}" if is_percent(metric) else measured(plain, 3)
    unit = "" if not is_percent(metric) else " points" if sign else "%"
    return ("+" if sign and plain > 0 else "") + text + unit


def _float(value: Any) -> float:
    return float(value)  # JSON holds "inf" and "nan" as text


# ---- copying


def _copying(section: Section, copying: Mapping[str, Any] | None, folder: Path, problems: Problems) -> None:
    if copying is None:
        section.add(notice("Nearness to the training images was not measured: give --train.", "problem"))
        return
    section.add(copying["sentence"] + ".")
    metrics = list(_COPYING)
    head: list[Column | str] = [
        "Images",
        "Space",
        *(Column(name.capitalize(), hint, numeric=True) for name, hint in _COPYING.items()),
    ]
    head.append(Column("Data-copying z", "Meehan et al. 2020; far below 0 where samples lie nearer", numeric=True))
    rows = [[row["what"], row["space"], *_shares(row["values"], metrics), row["z"]] for row in copying["rows"]]
    few = f"{copying['num_training']} of {copying['of']}" if copying["num_training"] < copying["of"] else copying["of"]
    section.add(
        table(head, rows, caption=f"Beside {few} training images of {copying['training']}; mirrored ones count too"),
        _copying_notes(copying),
        element("h3", "Samples beside their nearest training images"),
        element(
            "p",
            "From left to right: the sample, its nearest training image in pixels, and in features. First those that "
            "lie nearest by ratio, then some evenly spaced.",
            class_="hint",
        ),
    )
    shown = []
    for item in copying["shown"]:
        names = [item["sample"], *(near["image"] for near in item["nearest"].values())]
        if (picture := _row_of(names, folder, problems)) is not None:
            shown.append(_figure(picture, f"{item['caption']} beside training images", _near_words(item)))
    section.add(element("div", *shown, class_="pictures"))


def _shares(values: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> list[Cell]:
    found = {value["metric"]: value for value in values}
    return [_share(found.get(metric)) for metric in metrics]


def _share(value: Mapping[str, Any] | None) -> Cell:
    if value is None:
        return Cell("–")
    share, low, high = (100 * _float(value[key]) for key in ("value", "low", "high"))
    interval = element("span", f"{low:.1f} to {high:.1f}", class_="range")
    return Cell(join(f"{share:.1f}%", interval), share, value["confidence"])


def _copying_notes(copying: Mapping[str, Any]) -> Html:
    entries = [part for name, text in _COPYING.items() for part in (element("dt", name), element("dd", text))]
    expected = (
        "at most 5%, then 5% and 50%, where samples lie as held-out images do; authenticity as that of held-out images"
    )
    entries += [element("dt", "expected"), element("dd", expected)]
    facts = dict.fromkeys(
        ", ".join(protocol_facts(Value.from_json(dict(row["values"][0])).protocol).values()) for row in copying["rows"]
    )
    entries += [part for text in facts for part in (element("dt", "protocol"), element("dd", text))]
    sources = (
        "Ratio: Carlini et al. 2023, arXiv 2301.13188, section 5.1. Authenticity: Alaa et al. 2022, arXiv 2102.08921. "
        "z: Meehan et al. 2020, arXiv 2004.05675. Nearness does not prove a copy, nor distance its absence: look."
    )
    return details("What these numbers are", element("dl", *entries, class_="protocols"), element("p", sources))


def _near_words(item: Mapping[str, Any]) -> Html:
    lines: list[Any] = [f"{item['caption']} ({item['what']})"]
    for space, found in item["nearest"].items():
        share = f"{100 * _float(found['nearer_than']):.0f}%"
        lines += [
            element("br"),
            f"{space}: {_float(found['distance']):.3g}, ratio {_float(found['ratio']):.2f} (less than {share} of "
            f"held-out images): {found['key']}, {found['caption']}",
        ]
    return join(*lines)


def _made(section: Section, environment: Mapping[str, Any]) -> None:
    rows = [[name, Cell(element("code", _plain(value)))] for name, value in environment.items() if value is not None]
    section.add(table(["What", "Value"], rows, caption="Of the drawing and measuring"))


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)
