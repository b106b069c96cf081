"""Samples of several runs side by side, on the same captions and noise, with a slider over the steps of training."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagen_lightning.report.markup import Html, element
from imagen_lightning.report.page import Section, data_uri, encode, notice
from imagen_lightning.report.runs import Problems
from imagen_lightning.report.sample_sets import SampleSet, open_picture

MOST_SHOWN = 8  # runs side by side
MOST_PROMPTS, MOST_STEPS = 12, 16
MOST_ALONE = 24  # captions where there is nothing to stand beside
_LEAST_PROMPTS, _LEAST_STEPS = 4, 2
_SIDES = (256, 192, 128, 96, 64)  # px, to which pictures are reduced where they are many
_TRIED = 24  # pictures from which the size of all is estimated

Key = tuple[str, int | None, int]


@dataclass(frozen=True)
class Drawer:
    """Something that drew samples: a run at several steps, or a cascade once.

    Attributes:
        identity: of the run in the page's tables; "" for what is no run.
        name: for people.
        sets: by rising step.
    """

    identity: str
    name: str
    sets: Sequence[SampleSet]


@dataclass(frozen=True)
class Budget:
    """What of the samples a page holds.

    Attributes:
        steps: sample sets of each drawer.
        prompts: captions.
        left_out: in words, what it does not hold; "" where it holds all.
    """

    steps: int
    prompts: int
    left_out: str


def plan(drawers: Sequence[Drawer], num_prompts: int, most_images: int) -> Budget:
    """Steps, then captions, are halved until there are no more images than `most_images`, or few of either are left."""
    longest = max(len(drawer.sets) for drawer in drawers)
    steps, prompts = min(longest, MOST_STEPS), min(num_prompts, MOST_PROMPTS if len(drawers) > 1 else MOST_ALONE)

    def count() -> int:
        return prompts * sum(min(steps, len(drawer.sets)) for drawer in drawers)

    while count() > most_images and steps > _LEAST_STEPS:
        steps = max(steps // 2, _LEAST_STEPS)
    while count() > most_images and prompts > _LEAST_PROMPTS:
        prompts = max(prompts // 2, _LEAST_PROMPTS)
    parts = []
    if steps < longest:
        parts.append(f"{steps} of up to {longest} steps")
    if prompts < num_prompts:
        parts.append(f"{prompts} of {num_prompts} captions")
    return Budget(steps, prompts, " and ".join(parts))


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of 0 … count-1, evenly spread, the first and the last among them where most is above 1."""
    if count <= most:
        return list(range(count))
    if most == 1:
        return [count - 1]
    return sorted({round(place * (count - 1) / (most - 1)) for place in range(most)})


def prompts_of(drawers: Sequence[Drawer]) -> list[Key]:
    """What was drawn, by caption and noise: that of most drawers first."""
    seen = Counter(
        key for drawer in drawers for key in {sample.key: None for item in drawer.sets for sample in item.samples}
    )
    order = {key: place for place, key in enumerate(seen)}
    return sorted(seen, key=lambda key: (-seen[key], order[key]))


class _Pictures:
    """The pictures of a page, each embedded once."""

    def __init__(self, side: int) -> None:
        self.side = side
        self.largest = 0  # px, as embedded
        self.reduced = False
        self.sources: list[str] = []
        self._places: dict[str, int] = {}

    def add(self, path: Path, problems: Problems) -> int | None:
        """The picture's place among the sources, None where it is broken."""
        picture = open_picture(path, problems.add)
        if picture is None:
            return None
        digest = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()
        if digest not in self._places:
            self.reduced |= max(picture.size) > self.side
            self.largest = max(self.largest, min(self.side, max(picture.size)))
            self._places[digest] = len(self.sources)
            self.sources.append(data_uri(encode(picture, self.side)))
        return self._places[digest]


def add_grid(
    section: Section, title: str, drawers: Sequence[Drawer], problems: Problems, most_images: int, most_bytes: int
) -> None:
    """Adds the samples of drawers of one kind of stage.

    Args:
        section: of the page.
        title: of the grid.
        drawers: each with at least one sample set.
        problems: takes note of broken pictures.
        most_images: pictures that this grid may hold.
        most_bytes: of the page that they may take; pictures are reduced to fit, and said to be.
    """
    prompts = prompts_of(drawers)
    budget = plan(drawers, len(prompts), most_images)
    prompts = prompts[: budget.prompts]
    chosen = {
        id(drawer): [drawer.sets[place] for place in evenly(len(drawer.sets), budget.steps)] for drawer in drawers
    }
    paths = {
        (id(item), sample.key): sample.path for sets in chosen.values() for item in sets for sample in item.samples
    }
    wanted = [
        paths[id(item), key] for sets in chosen.values() for item in sets for key in prompts if (id(item), key) in paths
    ]
    pictures = _Pictures(_side(wanted, most_bytes))

    def images_of(drawer: Drawer, key: Key) -> list[int | None] | None:
        sets = chosen[id(drawer)]
        if not any((id(item), key) in paths for item in sets):
            return None
        found = (paths.get((id(item), key)) for item in sets)
        return [None if path is None else pictures.add(path, problems) for path in found]

    content: dict[str, Any] = {
        "runs": [
            {
                "id": drawer.identity,
                "name": drawer.name,
                "steps": [item.step for item in chosen[id(drawer)]],
                "note": chosen[id(drawer)][-1].words,
                "images": [images_of(drawer, key) for key in prompts],
            }
            for drawer in drawers
        ],
        "prompts": [
            {"caption": caption, "seed": f"image {number}" if seed is None else f"seed {seed}, image {number}"}
            for caption, seed, number in prompts
        ],
        "steps": sorted({item.step for sets in chosen.values() for item in sets if item.step is not None}) or [0],
        "most": MOST_SHOWN,
    }
    left_out = [budget.left_out] if budget.left_out else []
    if pictures.reduced:
        left_out.append(f"pictures reduced to {pictures.side} px")
    section.add(element("h3", title))
    if left_out:
        section.add(notice(f"So that the page stays small, it holds {'; '.join(left_out)}."))
    section.add(
        _box(section.data("samples", {**content, "images": pictures.sources}), title, content, pictures.largest)
    )


def _side(paths: Sequence[Path], most_bytes: int) -> int:
    """The largest side at which the pictures are likely to take no more than `most_bytes`."""
    tried = [paths[place] for place in evenly(len(paths), _TRIED)]
    silent = Problems()
    found = [picture for path in tried if (picture := open_picture(path, silent.add)) is not None]
    for side in _SIDES[:-1]:
        sizes = [len(encode(picture, side)) for picture in found]
        if not sizes or sum(sizes) / len(sizes) * 4 / 3 * len(paths) <= most_bytes:
            return side
    return _SIDES[-1]


def _box(identity: str, title: str, content: dict[str, Any], side: int) -> Html:
    bar = []
    if len(content["steps"]) > 1:
        last = len(content["steps"]) - 1
        slider = element("input", type="range", min=0, max=last, value=last, step=1)
        bar += [
            element("label", "Training step", slider, element("output", class_="step")),
            element("button", "Play", type="button", data_play=True),
        ]
    bar.append(element("button", "Larger", type="button", data_larger=True, aria_pressed="false"))
    inner = element("table", element("caption", f"{title}: captions by rows, runs by columns"))
    return element(
        "div",
        element("div", *bar, class_="bar"),
        element("p", class_="hint shown", aria_live="polite"),
        element("div", class_="gallery"),
        element("div", inner, class_="scroll", role="region", aria_label=title, tabindex=0),
        class_="samples",
        data_samples=identity,
        data_pixelated=side <= 64,
        style="--cell:128px",
    )


def drawer_kinds(drawers: Sequence[Drawer]) -> list[tuple[str, list[Drawer]]]:
    """Drawers by the stage that drew: bases, super-resolution stages, whole cascades; with a title each."""
    titles = {0: "Base stages", 1: "Super-resolution stages", None: "Cascades"}
    kinds: dict[int | None, list[Drawer]] = {}
    for drawer in drawers:
        kinds.setdefault(drawer.sets[-1].stage, []).append(drawer)
    return [
        (titles.get(stage, f"Stages {stage}"), found)
        for stage, found in sorted(kinds.items(), key=lambda item: (item[0] is None, item[0] or 0))
    ]
