"""What to evaluate on: the built-in shapes' held-out scenes, shards, or a set of prompts without images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from imagen_lightning.data.dataset import ShapesDataset, ShardDataset
from imagen_lightning.data.shapes import CANVAS, parse_caption
from imagen_lightning.errors import InputError
from imagen_lightning.evaluation.prompts import PromptSet

SHAPES = "shapes"


@dataclass(frozen=True)
class EvaluationSet:
    """Captions and the real images that belong to them.

    Attributes:
        name: what the user gave, "shapes" or the shards' names.
        captions: N strings.
        images: (N, 3, S, S) uint8, S the size of the cascade's last stage; None for prompts.
        sha256: of images and captions, in order.
        has_answers: whether the captions are in the shapes' grammar, so that pictures can be checked against them.
        categories: category to the numbers of its captions, where there are categories.
    """

    name: str
    captions: list[str]
    images: Tensor | None
    sha256: str
    has_answers: bool
    categories: dict[str, list[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.captions)


def load_evaluation_set(
    name: str, num: int, size: int, seed: int = 0, caption_field: str | None = None
) -> EvaluationSet:
    """The first `num` held-out shapes of a seed, or `num` samples of shards, evenly spaced.

    Args:
        name: "shapes", or shards: a path, folder, glob or brace pattern.
        num: number of samples.
        size: side in pixels; images are resized by the area filter and cropped at the centre, as for validation.
        seed: of the shapes.
        caption_field: the json field of the captions in shards, see `decode_captions`.

    Raises:
        InputError: a number below 1, shapes beyond their size, shards that match nothing, or fewer usable samples.
    """
    if num < 1:
        raise InputError(f"number of samples {num} must be at least 1")
    if name == SHAPES:
        if size > CANVAS:
            raise InputError(
                f"shapes are drawn at {CANVAS} px and the cascade makes {size} px; give shards as the data"
            )
        dataset: ShapesDataset | ShardDataset = ShapesDataset(seed, "held_out", size, num)
    else:
        dataset = _shards(name, num, size, caption_field)
    samples = [dataset[position] for position in range(len(dataset))]
    usable = [(sample.image, sample.caption) for sample in samples if sample.image is not None]
    if len(usable) < num:
        faults = [skip for sample in samples for skip in sample.skips]
        reason = f" (the first: {faults[0]}, {faults[0].reason.value})" if faults else ""
        raise InputError(
            f"{name!r} has {len(usable)} usable samples at {size} px, {num} are asked for{reason}; lower --num, or "
            "give more shards"
        )
    images, captions = torch.stack([image for image, _ in usable]), [caption for _, caption in usable]
    digest = hashlib.sha256(images.numpy().tobytes() + "\n".join(captions).encode())
    return EvaluationSet(name, captions, images, digest.hexdigest(), name == SHAPES)


def prompt_evaluation_set(prompts: PromptSet) -> EvaluationSet:
    """Prompts alone: pictures are measured against them by CLIP, and where all are of the shapes' grammar, by that."""
    digest = hashlib.sha256("\n".join(prompts.captions).encode())
    return EvaluationSet(
        prompts.name, prompts.captions, None, digest.hexdigest(), _are_of_shapes(prompts.captions), prompts.rows()
    )


def _are_of_shapes(captions: list[str]) -> bool:
    try:
        for caption in captions:
            parse_caption(caption)
    except InputError:
        return False
    return True


def _shards(name: str, num: int, size: int, caption_field: str | None) -> ShardDataset:
    from imagen_lightning.data.datamodule import LaionDataModule

    data = LaionDataModule(train=name, val=name, image_size=size, caption_field=caption_field, num_val=num)
    return data.validation_set()
