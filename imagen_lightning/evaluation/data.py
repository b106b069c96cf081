"""What to evaluate on: the built-in shapes' held-out scenes, shards, or a set of prompts without images."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeAlias

from torch import Tensor
from torch.utils.data import ConcatDataset

from imagen_lightning.data.dataset import Sample, ShapesDataset, ShardDataset
from imagen_lightning.data.shapes import CANVAS, parse_caption
from imagen_lightning.data.skips import Skip
from imagen_lightning.data.subjects import Subject, SubjectDataset
from imagen_lightning.errors import InputError, counted
from imagen_lightning.evaluation.image_set import ImageSet
from imagen_lightning.evaluation.prompts import PromptSet, encodable
from imagen_lightning.metrics.digests import digest_texts

log = logging.getLogger(__name__)

SHAPES = "shapes"
Samples: TypeAlias = ShapesDataset | ShardDataset | ConcatDataset[Sample]


@dataclass(frozen=True)
class EvaluationSet:
    """Captions and the real images that belong to them.

    Attributes:
        name: what the user gave, "shapes", "shapes:hourglass" or the shards' names.
        captions: N strings.
        images: N images at the size of the cascade's last stage; None for prompts.
        sha256: of images and captions, in order.
        has_answers: whether the captions are in the shapes' grammar, so that pictures can be checked against them.
        categories: category to the numbers of its captions, where there are categories.
    """

    name: str
    captions: list[str]
    images: ImageSet | None
    sha256: str
    has_answers: bool
    categories: dict[str, list[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.captions)


def load_evaluation_set(
    name: str, num: int, size: int, seed: int = 0, caption_field: str | None = None
) -> EvaluationSet:
    """The first `num` held-out shapes of a seed, or `num` samples of shards, evenly spaced.

    Samples that cannot be used are left out, and counted in a warning; those behind them stand in.

    Args:
        name: "shapes"; "shapes:SUBJECT", such as "shapes:hourglass", for scenes of one subject, in the second half of
            them of a pair that training never shows (see `imagen_lightning.data.subjects`); or shards: a path, folder,
            glob or brace pattern.
        num: number of samples.
        size: side in pixels; images are resized by the area filter and cropped at the centre, as for validation.
        seed: of the shapes.
        caption_field: the json field of the captions in shards, see `decode_captions`.

    Raises:
        InputError: a number below 1, shapes beyond their size, shards that match nothing, or fewer usable samples.
    """
    if num < 1:
        raise InputError(f"number of samples {num} must be at least 1")
    drawn, _, subject = name.partition(":")
    if drawn == SHAPES:
        if size > CANVAS:
            raise InputError(
                f"shapes are drawn at {CANVAS} px and the cascade makes {size} px; give shards as the data"
            )
        dataset: Samples = ShapesDataset(seed, "held_out", size, num)
        if name != SHAPES:
            halves = {"val": num - num // 2, "held_out": num // 2}
            dataset = ConcatDataset(
                SubjectDataset(Subject.of(subject), seed, split, size, part) for split, part in halves.items()
            )
    else:
        dataset = _shards(name, size, caption_field)
    found, captions, skips = _usable(dataset, num)
    if len(found) < num:
        reason = f" (the first: {skips[0]}, {skips[0].reason.value})" if skips else ""
        raise InputError(
            f"{name!r} has {counted(len(found), 'usable sample')} at {size} px, {num} are asked for{reason}; lower "
            "--num, or give more shards"
        )
    if skips:
        log.warning(
            "%s of %r cannot be used, others stand in (the first: %s, %s)",
            counted(len(skips), "sample"), name, skips[0], skips[0].reason.value,
        )  # fmt: skip
    images = ImageSet(num, size, lambda number: _image(dataset, found[number]), keep=True)
    digest = hashlib.sha256()
    for number in range(num):
        digest.update(images[number : number + 1].numpy().tobytes())
    digest.update(digest_texts(captions).encode())
    return EvaluationSet(name, captions, images, digest.hexdigest(), drawn == SHAPES)


def prompt_evaluation_set(prompts: PromptSet) -> EvaluationSet:
    """Prompts alone: pictures are measured against them by CLIP, and where all are of the shapes' grammar, by that."""
    captions = prompts.captions
    return EvaluationSet(prompts.name, captions, None, digest_texts(captions), _are_of_shapes(captions), prompts.rows())


def _are_of_shapes(captions: list[str]) -> bool:
    try:
        for caption in captions:
            parse_caption(caption)
    except InputError:
        return False
    return True


def _usable(dataset: Samples, num: int) -> tuple[list[int], list[str], list[Skip]]:
    """Positions of `num` usable samples, as evenly spaced as may be, in order; their captions; what was left out."""
    captions: dict[int, str] = {}
    skips: list[Skip] = []
    for position in _spread(len(dataset), num):
        if len(captions) == num:
            break
        sample = dataset[position]
        if sample.image is None:
            skips += sample.skips
        else:
            captions[position] = encodable(sample.caption)
    found = sorted(captions)
    return found, [captions[position] for position in found], skips


def _spread(count: int, num: int) -> Iterator[int]:
    """All positions below `count`: `num` evenly spaced ones, then those one behind these, two behind, and so on."""
    starts = [k * count // num for k in range(num)] if num < count else list(range(count))
    ends = [*starts[1:], count]
    longest = max((end - start for start, end in zip(starts, ends)), default=0)
    return chain.from_iterable(
        (start + step for start, end in zip(starts, ends) if start + step < end) for step in range(longest)
    )


def _image(dataset: Samples, position: int) -> Tensor:
    image = dataset[position].image
    if image is None:
        raise InputError(f"sample {position} of the data can no longer be read; are its shards as they were?")
    return image


def _shards(name: str, size: int, caption_field: str | None) -> ShardDataset:
    from imagen_lightning.data.datamodule import LaionDataModule

    return LaionDataModule(train=name, val=name, image_size=size, caption_field=caption_field).validation_set()
