"""Metrics of what a stage draws while it trains: drawn once a step, shared by all metrics and all processes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

import lightning.pytorch as pl  # isort: skip

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
from imagen_lightning.callbacks.observer import Observer, together
from imagen_lightning.callbacks.processes import of_all_processes
from imagen_lightning.callbacks.rng import untouched_rng
from imagen_lightning.callbacks.schedule import Schedule
from imagen_lightning.callbacks.throughput import uncounted
from imagen_lightning.callbacks.values import column_of, log_values, rewind_values, stage_name
from imagen_lightning.metrics.digests import digest_tensors, digest_texts
from imagen_lightning.metrics.distributed import gather_by_position
from imagen_lightning.metrics.protocol import Protocol, Value
from imagen_lightning.stages import DiffusionMixin
from imagen_lightning.types import InputError, Sampler


@dataclass(frozen=True)
class Given:
    """What a stage is measured on.

    Attributes:
        own: this process's part, possibly nothing.
        captions: all processes', in order.
        reference: SHA-256 of all processes' real images, in order; None without such.
        name: what people call the images.
        device: where networks that look at images run.
    """

    own: Pictures
    captions: list[str]
    reference: str | None
    name: str
    device: torch.device

    @property
    def positions(self) -> Tensor:
        """(N_r,) int64 numbers of this process's part."""
        return torch.tensor(self.own.positions, dtype=torch.int64)


class SampledMetric(Observer):
    """Draws the same captions from the same seeds every n steps with the EMA's weights, and measures the images.

    Captions are those of the first samples of the validation set, whose images are the reference; a super-resolution
    stage enlarges these images' reductions. All processes draw a part each and take part in the measuring, whatever
    their number the same images. Training is the same to the bit as without. Callbacks that draw alike share one
    drawing.

    A subclass says what it is called (`metric`), what it needs (`prepare`), what each process finds of its own images
    (`look`), and what all of that is worth (`value`). An exception in one process leaves the measurement out in all.

    Args:
        num_samples: images drawn, fewer where there are fewer or some cannot be used; the real images stay in memory.
        every_n_steps: optimizer steps between two measurements.
        every_n_epochs: passes over the training data, in the place of steps.
        at_end: whether to measure when training ends, unless a signal ended it.
        split: "val", or "train": the first samples that the run consumes.
        prompts: captions in the place of the data's, for a base stage and metrics without reference images.
        seed: image i takes its noise from (seed, i).
        num_steps: network evaluations an image; by default the stage's own, like the next three.
        guidance: classifier-free guidance weight.
        sampler: the algorithm.
        aug_level: in [0, 1], noise on the low-resolution input of a super-resolution stage.
        batch_size: images drawn at once.
        label: added to the name of the metric, "base/fid_LABEL", where several callbacks log one metric.
        strict: end training where this fails, rather than log it and continue.

    Raises:
        InputError: a number below its least; when training starts, data without such images, prompts where reference
            images are needed, an aug_level that the stage does not take, a network that cannot be had, or another
            callback that logs the same name.
    """

    needs_reference = False
    least = 2

    def __init__(
        self,
        num_samples: int = 256,
        every_n_steps: int = 5000,
        every_n_epochs: float | None = None,
        at_end: bool = True,
        split: Split = "val",
        prompts: Sequence[str] = (),
        seed: int = 0,
        num_steps: int | None = None,
        guidance: float | None = None,
        sampler: Sampler | None = None,
        aug_level: float | None = None,
        batch_size: int = 32,
        label: str = "",
        strict: bool = False,
    ) -> None:
        name = type(self).__name__
        if num_samples < self.least or split not in SPLITS:
            raise InputError(
                f"{name} num_samples {num_samples} must be at least {self.least}, and split {split!r} 'val' or 'train'"
            )
        if prompts and (self.needs_reference or len(prompts) < self.least):
            least = "no prompts but real images" if self.needs_reference else f"at least {self.least} prompts"
            raise InputError(f"{name} needs {least}; drop its prompts, which are {len(prompts)}")
        self.num_samples = num_samples
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs
        self.at_end = at_end
        self.split = split
        self.prompts = prompts
        self.seed = seed
        self.num_steps = num_steps
        self.guidance = guidance
        self.sampler = sampler
        self.aug_level = aug_level
        self.batch_size = batch_size
        self.label = label
        self.strict = strict
        self._schedule = Schedule(every_n_steps, every_n_epochs, at_end)
        self._settings = DrawingSettings(seed, num_steps, guidance, sampler, aug_level, batch_size)
        self._given: Given | None = None
        self._drawn: tuple[Any, Tensor, bool] | None = None  # of the step at hand: what, images, averaged

    @property
    @abstractmethod
    def metric(self) -> str:
        """What is measured, "FID"."""

    @abstractmethod
    def prepare(self, given: Given) -> None:
        """Gets ready what measuring needs, so that what cannot be had is refused before the run; all processes call."""

    @abstractmethod
    def look(self, images: Tensor, given: Given) -> Tensor:
        """Return (N_r, ...) on the CPU: what this process finds of its images; without waiting for the others.

        Args:
            images: (N_r, 3, H, W) uint8 on the CPU, what this process generated; possibly none.
            given: what they were generated from, and real images where there are any.
        """

    @abstractmethod
    def value(self, found: Tensor, protocol: Protocol) -> Value:
        """Return the metric.

        Args:
            found: (N, ...) what `look` found in all processes, in the order of the images.
            protocol: all but the metric and what the images are compared with.
        """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        name = type(self).__name__
        require_stage(trainer, pl_module, name)
        assert isinstance(pl_module, DiffusionMixin)
        self._schedule.start(trainer, name)
        self._settings.of(pl_module)
        self._drawn = None
        self._refuse_double(trainer, pl_module)
        rewind_values(trainer)
        with uncounted(trainer), untouched_rng(pl_module.device), torch.no_grad():
            self._given = self._find(trainer, pl_module)
            self.prepare(self._given)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._drawn = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._schedule.is_due(trainer):
            with self.tolerating(trainer):
                self._evaluate(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._schedule.is_due_at_end(trainer):
            with self.tolerating(trainer):
                self._evaluate(trainer, pl_module)

    def metric_names(self, stage: str) -> set[str]:
        """Return what may be logged of the stage of that name."""
        parts = [column_of(stage, self.metric), "train" if self.split == "train" else "", self.label]
        return {"_".join(part for part in parts if part)}

    def _column(self, stage: DiffusionMixin) -> str:
        """The name in the loggers."""
        return self.metric_names(stage_name(stage)).pop()

    def _refuse_double(self, trainer: pl.Trainer, stage: DiffusionMixin) -> None:
        name = self._column(stage)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, SampledMetric) and other is not self and other._column(stage) == name:
                raise InputError(f"two callbacks log {name}; give one a label")

    def _find(self, trainer: pl.Trainer, stage: Any) -> Given:
        name, share = type(self).__name__, (trainer.global_rank, trainer.world_size)
        if self.prompts:
            if getattr(stage, "low_res_size", None) is not None:
                raise InputError(f"{name} of a super-resolution stage needs real images; drop its prompts")
            everything = prompt_pictures(self.prompts)
            own = everything.part(slice(*share[:1], None, share[1]))
            return Given(own, everything.captions, None, "prompts", stage.device)
        own = together(lambda: first_pictures(trainer, stage, self.num_samples, name, self.split, share))
        assert own.truth is not None
        facts = zip(own.positions, own.captions, (digest_tensors([image]) for image in own.truth))
        everyone = sorted(fact for facts in of_all_processes(list(facts)) for fact in facts)
        if len(everyone) < self.least:
            raise InputError(f"{name} needs at least {self.least} {SPLITS[self.split]} images; found {len(everyone)}")
        captions, digests = [caption for _, caption, _ in everyone], [digest for _, _, digest in everyone]
        return Given(own, captions, digest_texts(digests), f"{SPLITS[self.split]} images", stage.device)

    def _evaluate(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        assert isinstance(stage, DiffusionMixin)
        given = self._given
        assert given is not None
        averaged = False

        def look() -> Tensor:
            nonlocal averaged
            images, averaged = self._draw(trainer, stage, given.own)
            return self.look(images, given)

        with uncounted(trainer), untouched_rng(stage.device), torch.no_grad():
            found = gather_by_position(together(look), given.positions)
            value = self.value(found, self._protocol(trainer, stage, given, averaged))
        log_values(trainer, {self._column(stage): value})

    def _draw(self, trainer: pl.Trainer, stage: pl.LightningModule, own: Pictures) -> tuple[Tensor, bool]:
        """What another callback has drawn at this step where it draws alike, else anew."""
        source = None if own.low_res is None else self.split
        key = self._settings, tuple(own.captions), tuple(own.positions), source
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, SampledMetric) and other._drawn is not None and other._drawn[0] == key:
                return other._drawn[1:]
        self._drawn = (key, *draw(trainer, stage, own, self._settings))
        return self._drawn[1:]

    def _protocol(self, trainer: pl.Trainer, stage: DiffusionMixin, given: Given, averaged: bool) -> Protocol:
        return Protocol(
            type(self).__name__,
            image_size=stage.image_size,
            num_samples=len(given.captions),
            prompts=digest_texts(given.captions),
            weights="ema" if averaged else "raw",
            precision=str(trainer.precision),
            **self._settings.protocol(stage),
        )
