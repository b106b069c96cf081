"""Metrics of what a stage draws while it trains: drawn once a step, shared by all metrics and all processes."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

import lightning.pytorch as pl  # isort: skip

from imagen_lightning.callbacks.checkpoint import interrupted
from imagen_lightning.callbacks.drawing import DrawingSettings, Pictures, draw, pictures, validation_pictures
from imagen_lightning.callbacks.rng import untouched_rng
from imagen_lightning.callbacks.run_folder import run_dir
from imagen_lightning.callbacks.throughput import uncounted
from imagen_lightning.callbacks.values import VALUES, log_values, rewind_values
from imagen_lightning.metrics.digests import digest_texts
from imagen_lightning.metrics.protocol import Protocol, Value
from imagen_lightning.stages import DiffusionMixin
from imagen_lightning.types import InputError

# What each trainer's stage drew last: (key, images of this process, averaged).
_LAST: WeakKeyDictionary[pl.Trainer, tuple[Any, Tensor, bool]] = WeakKeyDictionary()


class SampledMetric(pl.Callback):
    """Draws the same captions from the same seeds every n steps with the EMA's weights, and measures the images.

    Captions are the first `num_samples` of the validation set, whose images are the reference; a super-resolution stage
    enlarges these images' reductions. All processes draw a part each and take part in the measuring. Training is the
    same to the bit as without. Callbacks with equal settings share one drawing.

    Args:
        num_samples: images drawn; fewer where the validation set has fewer.
        every_n_steps: optimizer steps between two measurements.
        at_end: whether to measure when training ends, unless a signal ended it.
        prompts: captions in the place of the validation set's, for a base stage and metrics without reference images.
        seed: image i takes its noise from (seed, i).
        num_steps: network evaluations an image; by default the stage's own, like the next.
        guidance: classifier-free guidance weight.
        batch_size: images drawn at once.

    Raises:
        InputError: a number below its least; when training starts, no validation images, or prompts where reference
            images are needed.
    """

    needs_reference = False
    least = 2

    def __init__(
        self,
        num_samples: int = 256,
        every_n_steps: int = 5000,
        at_end: bool = True,
        prompts: Sequence[str] = (),
        seed: int = 0,
        num_steps: int | None = None,
        guidance: float | None = None,
        batch_size: int = 32,
    ) -> None:
        if num_samples < self.least or min(every_n_steps, batch_size) < 1 or (num_steps is not None and num_steps < 1):
            raise InputError(
                f"{type(self).__name__} num_samples {num_samples} must be at least {self.least}, every_n_steps "
                f"{every_n_steps}, batch_size {batch_size} and num_steps {num_steps} at least 1"
            )
        self.num_samples = num_samples
        self.every_n_steps = every_n_steps
        self.at_end = at_end
        self.prompts = prompts
        self.seed = seed
        self.num_steps = num_steps
        self.guidance = guidance
        self.batch_size = batch_size
        self._settings = DrawingSettings(seed, num_steps, guidance, batch_size)
        self._given: Pictures | None = None
        self._seen_step = self._measured_step = 0

    @abstractmethod
    def measure(self, images: Tensor, positions: Tensor, given: Pictures, protocol: Protocol) -> list[Value]:
        """The metrics over all processes, each of which calls.

        Args:
            images: (N_r, 3, H, W) uint8, what this process drew; possibly none.
            positions: (N_r,) int64, their places among `given`.
            given: all captions, with reference images where there are any.
            protocol: everything but the metric, the extractor and the reference.
        """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        name = type(self).__name__
        if not isinstance(pl_module, DiffusionMixin):
            raise InputError(f"{name} draws from stages of a cascade; {type(pl_module).__name__} is none")
        self._seen_step = self._measured_step = trainer.global_step
        if not self.prompts:
            self._given = validation_pictures(trainer, pl_module, self.num_samples, name)
            if len(self._given.captions) < self.least:
                raise InputError(f"{name} needs at least {self.least} validation images")
        elif self.needs_reference or getattr(pl_module, "low_res_size", None) is not None:
            raise InputError(f"{name} needs validation images here; drop its prompts")
        else:
            self._given = pictures(self.prompts, None, pl_module)
        if trainer.is_global_zero:
            rewind_values(run_dir(trainer) / VALUES, trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._seen_step and trainer.global_step % self.every_n_steps == 0:
            self._evaluate(trainer, pl_module)
        self._seen_step = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.at_end and trainer.global_step > self._measured_step and interrupted(trainer) is None:
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        assert isinstance(stage, DiffusionMixin)
        assert self._given is not None
        self._measured_step = trainer.global_step
        rows = range(trainer.global_rank, len(self._given.captions), trainer.world_size)
        images, averaged = _drawn(trainer, stage, self._given, self._settings, rows)
        protocol = self._protocol(trainer, stage, self._given, averaged)
        with uncounted(trainer), untouched_rng(stage.device), torch.no_grad():
            values = self.measure(images, torch.tensor(list(rows), dtype=torch.int64), self._given, protocol)
        log_values(trainer, stage, values)

    def _protocol(self, trainer: pl.Trainer, stage: DiffusionMixin, given: Pictures, averaged: bool) -> Protocol:
        sampling = stage.sampling
        return Protocol(
            type(self).__name__,
            image_size=stage.image_size,
            num_samples=len(given.captions),
            prompts=digest_texts(given.captions),
            weights="ema" if averaged else "raw",
            precision=str(trainer.precision),
            guidance=sampling.guidance if self.guidance is None else self.guidance,
            steps=self.num_steps or sampling.num_steps,
            sampler=type(sampling.sampler).__name__,
            aug_level=getattr(stage, "aug_level", None),
            seed=self.seed,
        )


def reference_of(given: Pictures) -> str:
    """SHA-256 of the reference images and their captions."""
    assert given.truth is not None
    return hashlib.sha256(given.truth.numpy().tobytes() + "\n".join(given.captions).encode()).hexdigest()


def _drawn(
    trainer: pl.Trainer, stage: pl.LightningModule, given: Pictures, settings: DrawingSettings, rows: range
) -> tuple[Tensor, bool]:
    key = (trainer.global_step, settings, tuple(given.captions), given.low_res is None, rows)
    if trainer not in _LAST or _LAST[trainer][0] != key:
        _LAST[trainer] = (key, *draw(trainer, stage, given, settings, rows))
    return _LAST[trainer][1:]
