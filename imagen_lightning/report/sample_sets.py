"""Folders of samples: those that SampleGrid draws while a stage trains, and those of `imagen-lightning sample`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from imagen_lightning.components import in_words
from imagen_lightning.metrics.protocol import setting_title

SAMPLES = "samples.json"
FORMATS = ("PNG", "JPEG", "WEBP")
Note = Callable[[Path, str], None]


@dataclass(frozen=True)
class Sample:
    """One image.

    Attributes:
        path: of the file.
        caption: what it was drawn from.
        seed: of its noise.
        number: of the image among those of the seed: image i takes its noise from (seed, i).
    """

    path: Path
    caption: str
    seed: int | None
    number: int

    @property
    def key(self) -> tuple[str, int | None, int]:
        """Equal for images that stand side by side: of the same caption and noise."""
        return self.caption, self.seed, self.number


@dataclass(frozen=True)
class SampleSet:
    """The images of one moment.

    Attributes:
        folder: where they lie.
        step: of training, or None for those of a whole cascade.
        stage: 0 for a base stage, 1 for super-resolution, None for a whole cascade.
        samples: the images.
        words: the settings, for people.
    """

    folder: Path
    step: int | None
    stage: int | None
    samples: tuple[Sample, ...]
    words: str


def read_steps(folder: Path, note: Note) -> list[SampleSet]:
    """The sample sets in RUN/samples by rising step."""
    if not folder.is_dir():
        return []
    found = []
    for place in sorted(path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal()):
        content = _content(place, note)
        if content is None:
            continue
        try:
            images = [_sample(place, item, "caption", content["seed"], item["image"]) for item in content["images"]]
            words = _settings({**content, "steps": content["num_steps"]})
            found.append(SampleSet(place, int(content["step"]), int(content["stage"]), tuple(images), words))
        except (KeyError, TypeError, ValueError):
            note(place / SAMPLES, "lacks what SampleGrid writes, and is left out")
    return sorted(found, key=lambda item: item.step or 0)


def read_drawn(folder: Path, note: Note) -> SampleSet | None:
    """What `imagen-lightning sample` wrote into a folder, None where it is broken."""
    content = _content(folder, note)
    if content is None:
        return None
    try:
        images = [_sample(folder, item, "prompt", item["seed"], item["index"]) for item in content["samples"]]
        stages = content["stages"]
        words = "; ".join(f"{item['stage']}: {_settings(item)}" for item in stages)
    except (KeyError, TypeError, ValueError):
        note(folder / SAMPLES, "lacks what `imagen-lightning sample` writes, and is left out")
        return None
    return SampleSet(folder, None, None, tuple(images), words)


def _settings(stage: dict[str, Any]) -> str:
    """How a stage was sampled, in words, as far as its record says."""
    parts = [f"guidance {stage['guidance']}", f"{stage['steps']} steps"]
    if "sampler" in stage:
        parts.append(in_words(stage["sampler"]))
    if stage.get("aug_level") is not None:
        parts.append(f"aug level {stage['aug_level']}")
    parts += [f"{setting_title(name)} {in_words(value)}" for name, value in stage.get("sampling", {}).items()]
    return ", ".join(parts)


def _content(folder: Path, note: Note) -> dict[str, Any] | None:
    path = folder / SAMPLES
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        note(folder, f"has no {SAMPLES}: half-written, and left out")
        return None
    except (OSError, ValueError, RecursionError):
        note(path, "is broken or half-written, and left out")
        return None
    if not isinstance(content, dict):
        note(path, "is no object, and left out")
        return None
    return content


def _sample(folder: Path, item: Any, caption: str, seed: Any, number: Any) -> Sample:
    name = item["file"]
    if Path(name).name != name or "\\" in name:
        raise ValueError(f"{name!r} lies in another folder")
    return Sample(folder / name, str(item[caption]), None if seed is None else int(seed), int(number))


def open_picture(path: Path, note: Note) -> Image.Image | None:
    """An RGB picture, None where the file is missing or broken, which is noted."""
    try:
        with Image.open(BytesIO(path.read_bytes()), formats=FORMATS) as picture:
            return picture.convert("RGB")
    except FileNotFoundError:
        note(path, "is missing")
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
        note(path, "is no whole picture")
    return None
