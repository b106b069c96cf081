"""Drawing with a stage while it trains: fixed captions and seeds, averaged weights, untouched random states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

import lightning.pytorch as pl  # isort: skip

from imagen_lightning.callbacks.ema import averaged_weights
from imagen_lightning.callbacks.rng import untouched_rng
from imagen_lightning.callbacks.throughput import uncounted
from imagen_lightning.diffusion.random import seeded_generator
from imagen_lightning.images import downsample, to_float, to_uint8
from imagen_lightning.stages import DiffusionMixin, SuperResolutionStage
from imagen_lightning.types import InputError


@dataclass(frozen=True)
class Pictures:
    """Captions, the real images that belong to them where there are any, and what a super-resolution stage is given.

    Attributes:
        captions: N strings.
        truth: (N, 3, H, W) uint8 at the stage's size, or None.
        low_res: (N, 3, h, w) uint8, the truth reduced by the one area filter; None for a base stage.
    """

    captions: list[str]
    truth: Tensor | None
    low_res: Tensor | None


def validation_pictures(trainer: pl.Trainer, stage: DiffusionMixin, num: int, who: str) -> Pictures:
    """The first `num` validation samples, fewer where there are fewer; the random states stay as they are.

    Args:
        trainer: whose datamodule is asked.
        stage: the stage in training.
        num: number of samples.
        who: the callback's name, for the error.

    Raises:
        InputError: there are none.
    """
    images: list[Tensor] = []
    captions: list[str] = []
    source = trainer.datamodule  # type: ignore[attr-defined]
    with untouched_rng():
        # Not the loader of validation: in a run of several processes that gives each a part.
        dataset: Any = None if source is None or not _validates(source) else source.validation_set()
        for position in range(0 if dataset is None else len(dataset)):
            sample = dataset[position]
            if sample.image is not None:
                images.append(sample.image)
                captions.append(sample.caption)
            if len(images) == num:
                break
    if not images:
        raise InputError(f"{who} found no validation images; give the data a validation set")
    return pictures(captions, torch.stack(images), stage)


def _validates(source: pl.LightningDataModule) -> bool:
    return not (hasattr(source, "val") and source.val is None)


def pictures(captions: Sequence[str], truth: Tensor | None, stage: DiffusionMixin) -> Pictures:
    """Captions and real images as the stage takes them."""
    low_res = None
    if isinstance(stage, SuperResolutionStage) and truth is not None:
        low_res = to_uint8(downsample(to_float(truth), stage.low_res_size))
    return Pictures(list(captions), truth, low_res)


@dataclass(frozen=True)
class DrawingSettings:
    """How a stage in training is sampled.

    Attributes:
        seed: image i takes its noise from (seed, i) and the stage's number, 0 for base and 1 for super-resolution.
        num_steps: network evaluations an image; None takes the stage's own, like the next.
        guidance: classifier-free guidance weight.
        batch_size: images drawn at once.
    """

    seed: int = 0
    num_steps: int | None = None
    guidance: float | None = None
    batch_size: int = 16


def draw(
    trainer: pl.Trainer, stage: pl.LightningModule, given: Pictures, settings: DrawingSettings, rows: Sequence[int]
) -> tuple[Tensor, bool]:
    """The images of some of the captions, with the weights of the EMA where there is one.

    Training is the same to the bit as without, and its measured speed leaves this time out.

    Args:
        trainer: of the run.
        stage: the stage in training.
        given: all captions.
        settings: see there.
        rows: numbers of the captions to draw, possibly none.

    Returns:
        (len(rows), 3, H, W) uint8 on the CPU, and whether the weights were an average.
    """
    assert isinstance(stage, DiffusionMixin)
    number = 0 if given.low_res is None else 1
    parts = [torch.zeros(0, 3, stage.image_size, stage.image_size, dtype=torch.uint8)]
    with (
        uncounted(trainer),
        untouched_rng(stage.device),
        averaged_weights(trainer, stage) as averaged,
        trainer.precision_plugin.forward_context(),
    ):
        for start in range(0, len(rows), settings.batch_size):
            own = list(rows[start : start + settings.batch_size])
            drawn = stage.sample(
                [given.captions[row] for row in own],
                [seeded_generator(settings.seed, row, stage=number) for row in own],
                num_steps=settings.num_steps,
                guidance=settings.guidance,
                low_res=None if given.low_res is None else to_float(given.low_res[own]),
            )
            parts.append(to_uint8(drawn).cpu())
    return torch.cat(parts), averaged
