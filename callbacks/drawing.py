"""Drawing with a stage while it trains: fixed captions and seeds, averaged weights, untouched random states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

import lightning.pytorch as pl  # isort: skip
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy  # isort: skip

from imagen_lightning.callbacks.ema import averaged_weights
from imagen_lightning.callbacks.rng import untouched_rng
from imagen_lightning.callbacks.throughput import uncounted
from imagen_lightning.cascade.sampling import StageSettings, protocol_fields, settings_of
from imagen_lightning.diffusion.random import seeded_generator
from imagen_lightning.images import downsample, placeholder, to_float, to_uint8
from imagen_lightning.stages import DiffusionMixin, SuperResolutionStage
from imagen_lightning.types import Batch, InputError, NonFiniteSamples, Sampler

Split = Literal["val", "train"]
SPLITS = {"val": "validation", "train": "training"}


@dataclass(frozen=True)
class Pictures:
    """Captions, the real images that belong to them where there are any, and what a super-resolution stage is given.

    Attributes:
        captions: N strings.
        positions: their N numbers, from which they take their noise.
        truth: (N, 3, H, W) uint8 at the stage's size, or None.
        low_res: (N, 3, h, w) uint8, the truth reduced by the one area filter; None for a base stage.
    """

    captions: list[str]
    positions: list[int]
    truth: Tensor | None
    low_res: Tensor | None

    def __len__(self) -> int:
        return len(self.captions)

    def part(self, rows: slice) -> Pictures:
        """Some of them."""
        truth, low_res = (None if images is None else images[rows] for images in (self.truth, self.low_res))
        return Pictures(self.captions[rows], self.positions[rows], truth, low_res)

    def parts(self, size: int) -> Iterator[Pictures]:
        """All of them, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.part(slice(start, start + size))

    def batches(self, size: int) -> list[Batch]:
        """Captions and real images as a stage's `condition` takes them, `size` at a time."""
        assert self.truth is not None
        return [
            Batch(part.truth, part.captions, [""] * len(part), torch.tensor(part.positions))  # type: ignore[arg-type]
            for part in self.parts(size)
        ]


def require_stage(trainer: pl.Trainer, module: pl.LightningModule, who: str) -> None:
    """Refuses to draw with anything but a stage that each process has as a whole; `who` is the callback's name."""
    if not isinstance(module, DiffusionMixin):
        raise InputError(f"{who} looks at stages of a cascade; {type(module).__name__} is none")
    # Processes draw different numbers of images: where each pass through the network needs all of them, they would wait
    # for each other for ever.
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
        name = type(trainer.strategy).__name__
        raise InputError(f"{who} cannot draw with weights that {name} spreads over processes; use strategy ddp")


def prompt_pictures(prompts: Sequence[str]) -> Pictures:
    """Captions alone, numbered as they come."""
    return Pictures(list(prompts), list(range(len(prompts))), None, None)


def first_pictures(
    trainer: pl.Trainer,
    stage: DiffusionMixin,
    num: int,
    who: str,
    split: Split = "val",
    share: tuple[int, int] | None = None,
) -> Pictures:
    """The first samples of a part of the data; the random states stay as they are.

    Args:
        trainer: whose datamodule is asked.
        stage: the stage in training.
        num: number of samples, fewer where there are fewer.
        who: the callback's name, for errors.
        split: the validation set, or the training set as a run consumes it.
        share: this process's number and the number of processes among which the first `num` samples are dealt out, less
            those that cannot be used; without it further samples take their place.

    Raises:
        InputError: the data has no such part, or images of another size in it, or, without a share, none at all.
    """
    with untouched_rng():
        # Not the loader of validation: in a run of several processes that gives each a part.
        dataset = _dataset(trainer, who, split)
        stop = num if split == "train" else len(dataset)
        numbers = range(stop) if share is None else range(share[0], min(num, stop), share[1])
        usable = (sample for sample in map(dataset.__getitem__, numbers) if sample.image is not None)
        found = list(islice(usable, num))
    if not found and share is None:
        raise InputError(f"{who} found no {SPLITS[split]} images that can be used")
    size = stage.image_size
    others = {tuple(sample.image.shape[-2:]) for sample in found} - {(size, size)}
    if others:
        mend = "use the validation set" if split == "train" else f"set data.init_args.image_size to {size}"
        raise InputError(f"{who} was given images of {min(others)} px for a stage of {size} px; {mend}")
    truth = torch.stack([torch.zeros(3, size, size, dtype=torch.uint8), *(sample.image for sample in found)])[1:]
    low_res = None
    if isinstance(stage, SuperResolutionStage):
        low_res = to_uint8(downsample(to_float(truth), stage.low_res_size))
    return Pictures([sample.caption for sample in found], [sample.position for sample in found], truth, low_res)


def _dataset(trainer: pl.Trainer, who: str, split: Split) -> Any:
    make = getattr(trainer.datamodule, f"{SPLITS[split]}_set", None)  # type: ignore[attr-defined]
    if make is None:
        raise InputError(f"{who} needs a {SPLITS[split]} set, which only the package's own DataModules give")
    try:
        dataset = make()
    except InputError as error:
        raise InputError(f"{who} needs {SPLITS[split]} images: {error}") from None
    if isinstance(dataset, IterableDataset):
        raise InputError(f"{who} cannot look at streamed training images; use the validation set")
    return dataset


@dataclass(frozen=True)
class DrawingSettings:
    """How a stage in training is sampled.

    Attributes:
        seed: image i takes its noise from (seed, i) and the stage's number, 0 for base and 1 for super-resolution.
        num_steps: network evaluations an image; None takes the stage's own, like the next.
        guidance: classifier-free guidance weight.
        sampler: the algorithm.
        aug_level: in [0, 1], noise on the low-resolution input; super-resolution alone.
        batch_size: images drawn at once.

    Raises:
        InputError: num_steps or batch_size below 1.
    """

    seed: int = 0
    num_steps: int | None = None
    guidance: float | None = None
    sampler: Sampler | None = None
    aug_level: float | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.num_steps is not None and self.num_steps < 1):
            raise InputError(f"num_steps {self.num_steps} and batch_size {self.batch_size} must be at least 1")

    def of(self, stage: DiffusionMixin) -> StageSettings:
        """Return all that decides the stage's images, its own settings in the place of what is None.

        Raises:
            InputError: an augmentation level that the stage does not take.
        """
        if self.aug_level is not None and not isinstance(stage, SuperResolutionStage):
            raise InputError(f"aug_level {self.aug_level} is for super-resolution stages; drop it")
        return settings_of(stage, self.guidance, self.num_steps, self.sampler, self.aug_level)

    def protocol(self, stage: DiffusionMixin) -> dict[str, Any]:
        """How a stage's images are made, as fields of a `imagen_lightning.metrics.protocol.Protocol`."""
        return {**protocol_fields([self.of(stage).described()]), "seed": self.seed}


def draw(
    trainer: pl.Trainer,
    stage: pl.LightningModule,
    given: Pictures,
    settings: DrawingSettings,
    on_non_finite: Callable[[NonFiniteSamples, list[int]], None] | None = None,
) -> tuple[Tensor, bool]:
    """An image a caption, with the weights of the EMA where there is one.

    Training is the same to the bit as without, and its measured speed leaves this time out.

    Args:
        trainer: of the run.
        stage: the stage in training.
        given: the captions, possibly none.
        settings: see there.
        on_non_finite: called with the error and the numbers of the images, from 0, that hold NaN or infinite values;
            placeholders stand in their places. By default such images are an error.

    Returns:
        (N, 3, H, W) uint8 on the CPU, and whether the weights were an average.

    Raises:
        NonFiniteSamples: images hold NaN or infinite values.
    """
    assert isinstance(stage, DiffusionMixin)
    number = 0 if given.low_res is None else 1
    images = [torch.zeros(0, 3, stage.image_size, stage.image_size, dtype=torch.uint8)]
    with (
        uncounted(trainer),
        untouched_rng(stage.device),
        averaged_weights(trainer, stage) as averaged,
        trainer.precision_plugin.forward_context(),
    ):
        for part in given.parts(settings.batch_size):
            try:
                drawn = to_uint8(_sample(stage, part, settings, number)).cpu()
            except NonFiniteSamples as error:
                if on_non_finite is None:
                    raise
                drawn = to_uint8(error.images.nan_to_num(0, 0, 0)).cpu()
                drawn[error.bad] = placeholder(*drawn.shape[-2:])
                on_non_finite(error, (error.bad.nonzero().flatten() + sum(map(len, images))).tolist())
            images.append(drawn)
    return torch.cat(images), averaged


def _sample(stage: DiffusionMixin, part: Pictures, settings: DrawingSettings, number: int) -> Tensor:
    return stage.sample(
        part.captions,
        [seeded_generator(settings.seed, position, stage=number) for position in part.positions],
        num_steps=settings.num_steps,
        guidance=settings.guidance,
        sampler=settings.sampler,
        low_res=None if part.low_res is None else to_float(part.low_res),
        aug_level=settings.aug_level,
    )
