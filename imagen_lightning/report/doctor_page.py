"""The page of `shards doctor`: what a set of shards holds, and what to mend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from imagen_lightning.data.doctor import Contents, Examination
from imagen_lightning.data.skips import counted_by_kind
from imagen_lightning.errors import counted
from imagen_lightning.report.figures import COLOURS, empty
from imagen_lightning.report.markup import element
from imagen_lightning.report.page import Page, Section, bullets, image, notice, table

if TYPE_CHECKING:
    import plotly.graph_objects as go

SHEET_COLUMNS, SHEET_ROWS, THUMB = 12, 6, 96
MOST_PAIRS = 24  # shown of duplicates and leaks
MOST_SKIPS = 200

Picture = Callable[[Contents, int], Image.Image]
"""From contents and a row to the sample's picture."""


def doctor_page(found: Examination, picture: Picture) -> Page:
    """The page of an examination."""
    contents = found.contents
    samples, shards = counted(len(contents), "usable sample"), counted(len(contents.shards), "shard")
    page = Page("Shards", f"{samples} in {shards}")
    advice = page.section("What to fix", "advice")
    words = found.advice()
    advice.add(bullets(words) if words else notice(_nothing(found), "verdict"))
    _sheet(page.section("Samples", "samples"), contents, picture)
    _sizes(page.section("Sizes", "sizes"), found)
    _captions(page.section("Captions", "captions"), found)
    _metadata(page.section("Metadata", "metadata"), contents)
    _alike(page.section("Copies and look-alikes", "copies"), found, picture)
    _skips(page.section("Samples that cannot be used", "skips"), contents)
    return page


def _nothing(found: Examination) -> str:
    """No advice, with what was not looked at and may need some."""
    unchecked = ", ".join(found.unchecked())
    return "Nothing to fix was found" + (f"; not checked: {unchecked}." if unchecked else ".")


def _sheet(section: Section, contents: Contents, picture: Picture) -> None:
    count = min(SHEET_COLUMNS * SHEET_ROWS, len(contents))
    if not count:
        section.add(notice("No sample can be used.", "problem"))
        return
    rows = [number * len(contents) // count for number in range(count)]
    sheet = Image.new("RGB", (SHEET_COLUMNS * THUMB, -(-count // SHEET_COLUMNS) * THUMB), "white")
    for place, row in enumerate(rows):
        corner = (place % SHEET_COLUMNS * THUMB, place // SHEET_COLUMNS * THUMB)
        sheet.paste(thumb(picture(contents, row)), corner)
    section.add(image(sheet, f"{count} samples", "Evenly spaced over the shards.", wide=True))
    lines = [element("li", f"{contents.keys[row]}: {contents.captions[row][0]}") for row in rows[:SHEET_COLUMNS]]
    section.add(element("p", "Captions of the first row:", class_="hint"), element("ol", *lines, class_="hint"))


def thumb(picture: Image.Image, side: int = THUMB) -> Image.Image:
    """The whole picture within a square, on grey; small ones are enlarged without smoothing."""
    scale = (side - 4) / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    resized = picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    square = Image.new("RGB", (side, side), (128, 128, 128))
    square.paste(resized, ((side - size[0]) // 2, (side - size[1]) // 2))
    ImageDraw.Draw(square).rectangle((0, 0, side - 1, side - 1), outline="white", width=2)
    return square


def _histogram(values: np.ndarray, x_title: str, marks: Sequence[tuple[str, float]] = ()) -> go.Figure:
    """Counts of values in at most 40 bins, whole numbers in bins of their own where they are few, with marks."""
    import plotly.graph_objects as go

    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "i" and high - low < 40:
        edges = np.arange(low - 0.5, high + 1)
    else:
        edges = np.linspace(low, high if high > low else low + 1, 41)
    counts, edges = np.histogram(values, edges)
    figure = empty(x_title, named=False, y_title="samples")
    centres, widths = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    figure.add_trace(go.Bar(x=centres.tolist(), y=counts.tolist(), width=widths.tolist(), marker={"color": COLOURS[0]}))
    for number, (name, place) in enumerate(marks):
        figure.add_vline(
            x=place, line={"color": COLOURS[(number + 1) % len(COLOURS)], "dash": "dash"}, annotation_text=name
        )
    return figure


def _sizes(section: Section, found: Examination) -> None:
    contents = found.contents
    if not len(contents):
        return
    if found.usable:
        rows = [[item.stage.name, item.stage.image_size, f"{item.share:.1%}"] for item in found.usable]
        section.add(table(["Stage", "px", "Images it can use"], rows, caption="Images at least as large as each stage"))
    marks = [(item.stage.name, float(item.stage.image_size)) for item in found.usable]
    section.figure(_histogram(contents.short_sides, "shorter side, px", marks=marks), "Resolution")
    section.figure(_histogram(contents.aspects, "width / height"), "Aspect")


def _captions(section: Section, found: Examination) -> None:
    contents = found.contents
    if not len(contents):
        return
    numbers = np.array([len(captions) for captions in contents.captions])
    words = np.array([len(captions[0].split()) for captions in contents.captions])
    distinct = len({caption for captions in contents.captions for caption in captions})
    section.add(
        f"{numbers.sum()} captions, {distinct} of them distinct; {numbers.mean():.1f} a sample; "
        f"{words.mean():.1f} words in the mean, at most {words.max()}."
    )
    section.figure(_histogram(words, "words of the first caption"), "Words")
    for item in found.usable:
        if item.tokens is not None and len(item.tokens) and item.stage.max_tokens is not None:
            marks = [(f"limit {item.stage.max_tokens}", float(item.stage.max_tokens))]
            note = f"{item.cut:.1%} are cut" if item.cut is not None else None
            figure = _histogram(item.tokens, "tokens", marks=marks)
            section.figure(figure, f"Tokens for {item.stage.name}", note)


def _metadata(section: Section, contents: Contents) -> None:
    if not contents.fields and not contents.columns:
        return
    rows: list[list[Any]] = []
    for name, column in contents.columns.items():
        is_number = column.dtype.kind == "f"
        there = ~np.isnan(column) if is_number else column != ""
        values = column[there]
        if is_number:
            shown = (
                ", ".join(f"{value:.4g}" for value in np.quantile(values, [0, 0.05, 0.5, 0.95, 1]))
                if len(values)
                else ""
            )
        else:
            kinds, counts = np.unique(values, return_counts=True)
            most = np.argsort(-counts)[:5]
            shown = ", ".join(f"{kinds[k]} ({counts[k]})" for k in most)
        rows.append([name, f"{there.mean():.0%}" if len(there) else "", shown])
    if rows:
        section.add(
            table(
                ["Field", "Samples that have it", "Least, 5%, median, 95%, most; or the most frequent"],
                rows,
                caption="Fields that filters know",
            )
        )
    if contents.fields:
        section.add(f"All fields of the json members: {', '.join(contents.fields)}.")


def _alike(section: Section, found: Examination, picture: Picture) -> None:
    contents, held_out = found.contents, found.held_out
    copies = sum(len(group) - 1 for group in found.exact)
    section.add(f"Exact copies of others: {copies}. Pairs that look alike: {len(found.near)}.")
    pairs = [(group[0], group[1]) for group in found.exact] + found.near
    _pairs(section, [(contents, i, contents, j) for i, j in pairs], picture)
    if held_out is not None:
        section.add(
            notice(
                f"{len(found.leaks)} of {counted(len(held_out), 'held-out image')} are in the training shards, or look "
                "like one there.",
                "problem" if found.leaks else "note",
            )
        )
        _pairs(section, [(contents, i, held_out, j) for i, j in found.leaks], picture)


def _pairs(section: Section, pairs: Sequence[tuple[Contents, int, Contents, int]], picture: Picture) -> None:
    shown = pairs[:MOST_PAIRS]
    if not shown:
        return
    columns = 4
    sheet = Image.new("RGB", (columns * (2 * THUMB + 16), -(-len(shown) // columns) * THUMB), "white")
    for place, (one, i, other, j) in enumerate(shown):
        x, y = place % columns * (2 * THUMB + 16), place // columns * THUMB
        sheet.paste(thumb(picture(one, i)), (x, y))
        sheet.paste(thumb(picture(other, j)), (x + THUMB, y))
    more = f" of {len(pairs)}" if len(pairs) > len(shown) else ""
    section.add(image(sheet, "pairs of pictures side by side", f"{len(shown)}{more} pairs.", wide=True))
    rows = [[one.name(i), other.name(j), one.captions[i][0], other.captions[j][0]] for one, i, other, j in shown]
    section.add(table(["One", "Other", "Its caption", "Other's caption"], rows, caption="The pairs shown above"))


def _skips(section: Section, contents: Contents) -> None:
    if contents.unread:
        rows = [[suffix, count] for suffix, count in sorted(contents.unread.items(), key=lambda item: -item[1])]
        section.add(table(["Suffix", "Members"], rows, caption="Members that are not read"))
    if not contents.skips:
        return
    reasons = [[reason, count] for reason, count in contents.reasons.most_common()]
    section.add(table(["Reason", "Samples"], reasons, caption="Why samples cannot be used"))
    rows = [[skip.key, skip.shard, skip.reason.value] for skip in contents.skips[:MOST_SKIPS]]
    more = f" (the first {MOST_SKIPS})" if len(contents.skips) > MOST_SKIPS else ""
    section.add(table(["Key", "Shard", "Reason"], rows, caption=f"Samples that cannot be used{more}"))


def summary(found: Examination) -> str:
    """The same for a terminal, in some lines."""
    contents = found.contents
    lines = [
        f"{counted(len(contents), 'usable sample')} in {counted(len(contents.shards), 'shard')}, "
        f"{len(contents.skips)} cannot be used"
    ]
    lines += [f"  {count} {reason}" for reason, count in contents.reasons.most_common()]
    if contents.unread:
        lines.append(f"members not read: {counted_by_kind(contents.unread)}")
    if len(contents):
        sides, aspects = contents.short_sides, contents.aspects
        low, middle, high = np.quantile(sides, [0.05, 0.5, 0.95])
        lines.append(f"shorter side: median {middle:.0f} px, 90% within {low:.0f} to {high:.0f}")
        low, middle, high = np.quantile(aspects, [0.05, 0.5, 0.95])
        lines.append(f"aspect: median {middle:.2f}, 90% within {low:.2f} to {high:.2f}")
    for item in found.usable:
        tokens = "" if item.cut is None else f"; {item.cut:.1%} of captions beyond {item.stage.max_tokens} tokens"
        lines.append(
            f"{item.stage.name} ({item.stage.image_size} px): {item.share:.1%} of the images are large enough{tokens}"
        )
    copies = sum(len(group) - 1 for group in found.exact)
    lines.append(f"{copies} exact copies, {len(found.near)} pairs look alike")
    if found.held_out is not None:
        lines.append(f"{len(found.leaks)} of {counted(len(found.held_out), 'held-out image')} leak into the shards")
    words = found.advice()
    lines += ["", "What to fix:", *(f"- {line}" for line in words)] if words else ["", _nothing(found)]
    return "\n".join(lines)
