"""What one cascade draws of several sets of captions, and how it measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagen_lightning.cascade import Cascade, StageSettings
from imagen_lightning.cascade.origin import weights_kinds
from imagen_lightning.cascade.sampling import protocol_fields
from imagen_lightning.evaluation.data import EvaluationSet
from imagen_lightning.evaluation.drawing import Chain, Drawing, Part
from imagen_lightning.evaluation.image_set import ImageSet
from imagen_lightning.evaluation.matrix import REAL_IMAGES, row_of
from imagen_lightning.evaluation.measures import Measured, Measurer
from imagen_lightning.evaluation.run import draw_chains
from imagen_lightning.evaluation.schema import Row
from imagen_lightning.metrics.digests import digest_texts
from imagen_lightning.metrics.features import FeatureExtractor
from imagen_lightning.metrics.protocol import Protocol

_BLOCK = 64


@dataclass(frozen=True)
class DrawingOptions:
    """How both cascades draw.

    Attributes:
        folder: where images are kept.
        guidance, steps: one for all stages, one a stage, or None for each cascade's own.
        seed: of the noise.
        batch_size: images at a time.
        precision: "32" or "bf16".
        share: this process's.
        meet: waits for the other processes.
    """

    folder: Path
    guidance: Any = None
    steps: Any = None
    seed: int = 0
    batch_size: int = 50
    precision: str = "32"
    share: Part = field(default_factory=Part)
    meet: Callable[[], None] = lambda: None


@dataclass
class Side:
    """What one cascade drew, by the name of a set of captions.

    Attributes:
        settings: of its stages.
        weights: what they are, as a protocol says it.
        precision, seed: of the drawing.
        images: of the whole cascade, read from their files.
        captions: of each set.
        rows: by stage, the whole cascade's last; of the measured sets alone.
        measured: the whole cascade, likewise.
        real: rows of the real images.
    """

    settings: Sequence[StageSettings]
    weights: str | list[str]
    precision: str
    seed: int
    images: dict[str, ImageSet] = field(default_factory=dict)
    captions: dict[str, list[str]] = field(default_factory=dict)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    measured: dict[str, Measured] = field(default_factory=dict)
    real: dict[str, list[Row]] = field(default_factory=dict)

    def protocol(self, name: str) -> Protocol:
        """How the images of a set were made, before anything is measured."""
        return Protocol(
            "none",
            image_size=self.images[name].size,
            num_samples=len(self.images[name]),
            prompts=digest_texts(self.captions[name]),
            weights=self.weights,
            precision=self.precision,
            seed=self.seed,
            **protocol_fields(setting.described() for setting in self.settings),
        )


def draw_side(
    cascade: Cascade,
    identity: str,
    sets: Mapping[str, EvaluationSet],
    options: DrawingOptions,
    measurers: Mapping[str, Measurer],
) -> Side:
    """Draws every set, or reads what was drawn, and lets the first process measure those that have a measurer.

    Args:
        cascade: on its device.
        identity: a hash of its weights (see `evaluation.identity`).
        sets: by name.
        options: how to draw.
        measurers: by the name of a set.

    Raises:
        InputError: settings that the cascade refuses.
    """
    settings = tuple(cascade.settings(guidance=options.guidance, steps=options.steps))
    side = Side(settings, weights_kinds(cascade.stages), options.precision, options.seed)
    for name, data in sets.items():
        drawing = Drawing(
            cascade,
            data,
            options.folder,
            identity=identity,
            seed=options.seed,
            batch_size=options.batch_size,
            precision=options.precision,
            part=options.share,
            meet=options.meet,
        )
        wanted = _chains(drawing, settings, name in measurers)
        draw_chains(drawing, wanted)
        side.images[name] = drawing.draw(wanted[-1]).images
        side.captions[name] = data.captions
        if options.share.rank == 0 and name in measurers:
            _measure(side, name, drawing, wanted, measurers[name])
        options.meet()
    return side


def _chains(drawing: Drawing, settings: tuple[StageSettings, ...], is_measured: bool) -> list[Chain]:
    """Each stage on what the cascade gives it, the whole cascade last; before it, enlargement of real images."""
    count = len(settings)
    chains = [Chain(0, last, settings[: last + 1]) for last in range(count)]
    if not is_measured:
        return chains[-1:]
    alone = [Chain(place, place, settings[place : place + 1]) for place in range(1, count)]
    if drawing.data.images is None:
        alone = []
    return [*chains[:-1], *alone, chains[-1]]


def _measure(side: Side, name: str, drawing: Drawing, wanted: Sequence[Chain], measurer: Measurer) -> None:
    found = [measurer.measure(drawing, chain) for chain in wanted]
    # Pictures are the page's own.
    side.rows[name] = [replace(row_of(drawing, *pair), samples=None) for pair in zip(wanted, found)]
    side.measured[name] = found[-1]
    side.real[name] = []
    if drawing.data.images is not None:
        for size in dict.fromkeys(stage.image_size for stage in drawing.cascade.stages):
            values = measurer.measure_real(drawing, size).values
            row = Row(f"{REAL_IMAGES}, {size} px", values=tuple(value.to_json() for value in values))
            side.real[name].append(row)


def features_of(extractor: FeatureExtractor, images: ImageSet, device: torch.device) -> Tensor:
    """(N, D) on the CPU, a block of images at a time."""
    return torch.cat([extractor(images[rows].to(device)).cpu() for rows in images.blocks(_BLOCK)])
