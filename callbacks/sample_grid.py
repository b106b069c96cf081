"""Samples of fixed prompts and seeds while a stage trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL.Image import Image
from torch import Tensor

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

import lightning.pytorch as pl  # isort: skip
from lightning.pytorch.loggers import WandbLogger  # isort: skip
from lightning.pytorch.utilities import rank_zero_warn  # isort: skip

from imagen_lightning.callbacks.drawing import (
    SPLITS,
    DrawingSettings,
    Pictures,
    Split,
    draw,
    first_pictures,
    prompt_pictures,
    require_stage,
)
from imagen_lightning.callbacks.loggers import log_table
from imagen_lightning.callbacks.observer import Observer, together
from imagen_lightning.callbacks.run_folder import run_dir
from imagen_lightning.callbacks.schedule import Schedule
from imagen_lightning.callbacks.values import column, column_of, log_values, rewind_values
from imagen_lightning.files import write_json
from imagen_lightning.images import grid, save_png, to_pil
from imagen_lightning.metrics.digests import digest_tensors, digest_texts
from imagen_lightning.metrics.probes import colour_shift
from imagen_lightning.metrics.protocol import EMA, RAW, Protocol
from imagen_lightning.metrics.values import mean_value
from imagen_lightning.stages import SuperResolutionStage
from imagen_lightning.types import InputError, NonFiniteSamples, Sampler

FOLDER = "samples"


class SampleGrid(Observer):
    """Draws the same captions from the same seeds every n steps, with the weights of the EMA where there is one.

    RUN/samples/STEP/ holds 00000.png, …, grid.png and samples.json; W&B gets the grid, and a table of captions and
    images. A super-resolution stage enlarges the first validation images: its grid has the low-resolution input, the
    output and the truth in three rows, and `STAGE/samples_colour_shift` is the mean distance of the outputs' colours
    from the inputs', of 255. The first process samples, the others go on; training is the same to the bit as without.
    An image with NaN or infinite values is a magenta checkerboard, named in samples.json and, once, in a warning.

    Args:
        prompts: captions, one an image. A super-resolution stage needs none: the validation images have their own, and
            given prompts take their place.
        num_images: how many validation images a super-resolution stage enlarges without prompts.
        every_n_steps: optimizer steps between two grids.
        every_n_epochs: passes over the training data, in the place of steps.
        at_end: whether to draw a last grid when training ends, unless a signal ended it.
        split: "val", or "train" for the first training images, of a super-resolution stage.
        seed: image i takes its noise from (seed, i) and the stage's number, 0 for base and 1 for super-resolution.
        num_steps: network evaluations an image; by default the stage's own, like the next three.
        guidance: classifier-free guidance weight.
        sampler: the algorithm.
        aug_level: in [0, 1], noise on the low-resolution input.
        batch_size: images drawn at once.
        strict: end training where this fails, rather than log it and continue.

    Raises:
        InputError: a number below 1; when training starts, a base stage without prompts, or no validation images, or
            fewer than prompts.
    """

    def __init__(
        self,
        prompts: Sequence[str] = (),
        num_images: int = 8,
        every_n_steps: int = 1000,
        every_n_epochs: float | None = None,
        at_end: bool = True,
        split: Split = "val",
        seed: int = 0,
        num_steps: int | None = None,
        guidance: float | None = None,
        sampler: Sampler | None = None,
        aug_level: float | None = None,
        batch_size: int = 16,
        strict: bool = False,
    ) -> None:
        if num_images < 1:
            raise InputError(f"SampleGrid num_images {num_images} must be at least 1")
        self.prompts = prompts
        self.num_images = num_images
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs
        self.at_end = at_end
        self.split = split
        self.seed = seed
        self.num_steps = num_steps
        self.guidance = guidance
        self.sampler = sampler
        self.aug_level = aug_level
        self.batch_size = batch_size
        self.strict = strict
        self._schedule = Schedule(every_n_steps, every_n_epochs, at_end)
        self._settings = DrawingSettings(seed, num_steps, guidance, sampler, aug_level, batch_size)
        self._given: Pictures | None = None  # in the first process
        self._warned = False  # of images that are not finite

    def metric_names(self, stage: str) -> set[str]:
        """Return what may be logged of the stage of that name."""
        return set() if stage == "base" else {column_of(stage, "samples colour shift")}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        require_stage(trainer, pl_module, "SampleGrid")
        self._schedule.start(trainer, "SampleGrid")
        self._settings.of(pl_module)  # type: ignore[arg-type]
        rewind_values(trainer)
        self._given = together(lambda: self._pictures(trainer, pl_module) if trainer.is_global_zero else None)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._schedule.is_due(trainer):
            with self.tolerating(trainer):
                self._draw(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._schedule.is_due_at_end(trainer):
            with self.tolerating(trainer):
                self._draw(trainer, pl_module)

    def _pictures(self, trainer: pl.Trainer, stage: Any) -> Pictures:
        if not isinstance(stage, SuperResolutionStage):
            if not self.prompts:
                raise InputError("SampleGrid has no prompts to draw; give it some")
            return prompt_pictures(self.prompts)
        found = first_pictures(trainer, stage, len(self.prompts) or self.num_images, "SampleGrid", self.split)
        if len(self.prompts) > len(found):
            raise InputError(
                f"SampleGrid has {len(self.prompts)} prompts for {len(found)} validation images, one to enlarge for "
                "each; give fewer prompts or more validation images"
            )
        # Numbered as they come, as the images of the grid are.
        return replace(found, captions=list(self.prompts) or found.captions, positions=list(range(len(found))))

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._given is None:
            return
        bad: list[int] = []

        def mark(error: NonFiniteSamples, numbers: list[int]) -> None:
            if not self._warned:
                rank_zero_warn(f"SampleGrid at step {trainer.global_step} shows checkerboards: {error}")
            self._warned = True
            bad.extend(numbers)

        images, averaged = draw(trainer, pl_module, self._given, self._settings, mark)
        low_res = self._given.low_res
        shifts = None if low_res is None else colour_shift(images, low_res)
        if shifts is not None:
            shifts[bad] = math.nan
        self._write(trainer, pl_module, self._given, images, shifts, averaged, bad)
        if shifts is not None and not bad:
            self._log_shift(trainer, pl_module, self._given, shifts, averaged)

    def _write(
        self,
        trainer: pl.Trainer,
        stage: Any,
        given: Pictures,
        images: Tensor,
        shifts: Tensor | None,
        averaged: bool,
        bad: Sequence[int],
    ) -> None:
        folder = run_dir(trainer) / FOLDER / f"{trainer.global_step:07d}"
        picture = _grid(stage, given, images)
        files = [f"{i:05d}.png" for i in range(len(images))]
        for name, image in zip(files, images):
            save_png(to_pil(image), folder / name)
        save_png(picture, folder / "grid.png")
        described = self._settings.of(stage).described()
        details = {
            "num_steps": described.pop("steps"),
            **described,
            "step": trainer.global_step,
            "weights": EMA if averaged else RAW,
            "precision": str(trainer.precision),
            "seed": self.seed,
            "stage": 0 if given.low_res is None else 1,
            "colour_shifts": None if shifts is None else shifts.tolist(),
            **({"not_finite": [files[number] for number in bad]} if bad else {}),
            "images": [
                {"file": name, "caption": caption, "image": position}
                for name, caption, position in zip(files, given.captions, given.positions)
            ],
        }
        write_json(folder / "samples.json", details)  # last: the folder is complete where it stands
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("samples", [picture], step=trainer.global_step)
                log_table(logger, "samples_table", _table(given, images, shifts), trainer.global_step)

    def _log_shift(self, trainer: pl.Trainer, stage: Any, given: Pictures, shifts: Tensor, averaged: bool) -> None:
        protocol = Protocol(
            "colour shift",
            image_size=stage.image_size,
            prompts=digest_texts(given.captions),
            reference=digest_tensors([given.low_res]),  # type: ignore[list-item]
            reference_name=f"low-resolution {SPLITS[self.split]} images",
            weights=EMA if averaged else RAW,
            precision=str(trainer.precision),
            **self._settings.protocol(stage),
        )
        shift = mean_value("colour shift", shifts, protocol)
        log_values(trainer, {column(stage, "samples colour shift"): shift})


def _grid(stage: Any, given: Pictures, images: Tensor) -> Image:
    """The images in a square; or low-resolution input, output and truth in three rows."""
    cell = max(stage.image_size, 96)
    if given.low_res is None or given.truth is None:
        columns = math.ceil(math.sqrt(len(images)))
        rows = [list(images[start : start + columns]) for start in range(0, len(images), columns)]
        return grid(rows, given.captions, cell=cell)
    rows = [list(given.low_res), list(images), list(given.truth)]
    return grid(rows, [""] * (2 * len(images)) + given.captions, cell=cell)


def _table(given: Pictures, images: Tensor, shifts: Tensor | None) -> dict[str, Sequence[Any]]:
    """The columns of W&B's table, a caption a row."""
    columns: dict[str, Sequence[Any]] = {"caption": given.captions, "image": [to_pil(image) for image in images]}
    if given.low_res is not None and given.truth is not None and shifts is not None:
        low_res, truth = ([to_pil(image) for image in part] for part in (given.low_res, given.truth))
        columns |= {"low_res": low_res, "truth": truth, "colour_shift": shifts.tolist()}
    return columns
