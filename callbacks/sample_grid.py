"""Samples of fixed prompts and seeds while a stage trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

import lightning.pytorch as pl  # isort: skip
from lightning.pytorch.loggers import WandbLogger  # isort: skip

from imagen_lightning.callbacks.checkpoint import interrupted
from imagen_lightning.callbacks.drawing import DrawingSettings, Pictures, draw, pictures, validation_pictures
from imagen_lightning.callbacks.run_folder import run_dir
from imagen_lightning.components import describe
from imagen_lightning.files import write_json
from imagen_lightning.images import grid, save_png, to_pil
from imagen_lightning.stages import DiffusionMixin, SuperResolutionStage
from imagen_lightning.types import InputError

FOLDER = "samples"


class SampleGrid(pl.Callback):
    """Draws the same captions from the same seeds every n steps, with the weights of the EMA where there is one.

    RUN/samples/STEP/ holds 00000.png, …, grid.png and samples.json; the grid goes to W&B too. A super-resolution stage
    enlarges the first validation images: its grid has the low-resolution input, the output and the truth in three rows.
    The first process samples, the others go on; training is the same to the bit as without.

    Args:
        prompts: captions, one an image. A super-resolution stage needs none: the validation images have their own, and
            given prompts take their place.
        num_images: how many validation images a super-resolution stage enlarges without prompts.
        every_n_steps: optimizer steps between two grids.
        at_end: whether to draw a last grid when training ends, unless a signal ended it.
        seed: image i takes its noise from (seed, i) and the stage's number, 0 for base and 1 for super-resolution.
        num_steps: network evaluations an image; by default the stage's own, like the next.
        guidance: classifier-free guidance weight.
        batch_size: images drawn at once.

    Raises:
        InputError: a number below 1; when training starts, a base stage without prompts, or no validation images, or
            fewer than prompts.
    """

    def __init__(
        self,
        prompts: Sequence[str] = (),
        num_images: int = 8,
        every_n_steps: int = 1000,
        at_end: bool = True,
        seed: int = 0,
        num_steps: int | None = None,
        guidance: float | None = None,
        batch_size: int = 16,
    ) -> None:
        if min(num_images, every_n_steps, batch_size) < 1 or (num_steps is not None and num_steps < 1):
            raise InputError(
                f"SampleGrid num_images {num_images}, every_n_steps {every_n_steps}, num_steps {num_steps} and "
                f"batch_size {batch_size} must be at least 1"
            )
        self.prompts = prompts
        self.num_images = num_images
        self.every_n_steps = every_n_steps
        self.at_end = at_end
        self.seed = seed
        self.num_steps = num_steps
        self.guidance = guidance
        self.batch_size = batch_size
        self._settings = DrawingSettings(seed, num_steps, guidance, batch_size)
        self._given: Pictures | None = None  # in the first process
        self._seen_step = self._drawn_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen_step = self._drawn_step = trainer.global_step
        if not isinstance(pl_module, DiffusionMixin):
            raise InputError(f"SampleGrid draws from stages of a cascade; {type(pl_module).__name__} is none")
        if trainer.is_global_zero:
            self._given = self._pictures(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._seen_step and trainer.global_step % self.every_n_steps == 0:
            self._draw(trainer, pl_module)
        self._seen_step = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.at_end and trainer.global_step > self._drawn_step and interrupted(trainer) is None:
            self._draw(trainer, pl_module)

    def _pictures(self, trainer: pl.Trainer, stage: DiffusionMixin) -> Pictures:
        if not isinstance(stage, SuperResolutionStage):
            if not self.prompts:
                raise InputError("SampleGrid has no prompts to draw; give it some")
            return pictures(self.prompts, None, stage)
        wanted = len(self.prompts) or self.num_images
        found = validation_pictures(trainer, stage, wanted, "SampleGrid")
        if len(self.prompts) > len(found.captions):
            raise InputError(
                f"SampleGrid has {len(self.prompts)} prompts for {len(found.captions)} validation images, one to "
                "enlarge for each; give fewer prompts or more validation images"
            )
        return replace(found, captions=list(self.prompts)) if self.prompts else found

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._drawn_step = trainer.global_step
        if not trainer.is_global_zero or self._given is None:
            return
        rows = range(len(self._given.captions))
        images, averaged = draw(trainer, pl_module, self._given, self._settings, rows)
        self._write(trainer, pl_module, self._given, images, averaged)

    def _write(self, trainer: pl.Trainer, stage: Any, given: Pictures, images: Tensor, averaged: bool) -> None:
        folder = run_dir(trainer) / FOLDER / f"{trainer.global_step:07d}"
        cell = max(stage.image_size, 96)
        if given.low_res is None or given.truth is None:
            columns = math.ceil(math.sqrt(len(images)))
            rows = [list(images[start : start + columns]) for start in range(0, len(images), columns)]
            picture = grid(rows, given.captions, cell=cell)
        else:
            rows = [list(given.low_res), list(images), list(given.truth)]
            picture = grid(rows, [""] * (2 * len(images)) + given.captions, cell=cell)
        files = [f"{i:05d}.png" for i in range(len(images))]
        for name, image in zip(files, images):
            save_png(to_pil(image), folder / name)
        save_png(picture, folder / "grid.png")
        settings = stage.sampling
        details = {
            "step": trainer.global_step,
            "weights": "ema" if averaged else "trained",
            "seed": self.seed,
            "stage": 0 if given.low_res is None else 1,
            "sampler": describe(settings.sampler),
            "spacing": describe(settings.spacing),
            "thresholding": describe(settings.thresholding),
            "num_steps": self.num_steps or settings.num_steps,
            "guidance": settings.guidance if self.guidance is None else self.guidance,
            "aug_level": None if given.low_res is None else stage.aug_level,
            "images": [
                {"file": name, "caption": caption, "image": i}
                for i, (name, caption) in enumerate(zip(files, given.captions))
            ],
        }
        write_json(folder / "samples.json", details)  # last: the folder is complete where it stands
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("samples", [picture], step=trainer.global_step)
