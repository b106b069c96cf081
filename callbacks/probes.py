"""What a stage has learned so far, in words: whether it hears its text, denoises, and keeps colours."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

import lightning.pytorch as pl  # isort: skip

from imagen_lightning.callbacks.checkpoint import interrupted
from imagen_lightning.callbacks.drawing import DrawingSettings, Pictures, draw, validation_pictures
from imagen_lightning.callbacks.ema import averaged_weights
from imagen_lightning.callbacks.rng import untouched_rng
from imagen_lightning.callbacks.run_folder import log_metrics, run_dir
from imagen_lightning.callbacks.throughput import uncounted
from imagen_lightning.callbacks.values import stage_name
from imagen_lightning.diffusion.random import Stream, normal
from imagen_lightning.files import write_json
from imagen_lightning.images import downsample, to_float, to_uint8
from imagen_lightning.stages import DiffusionMixin
from imagen_lightning.stages.mixin import VALIDATION_SEED
from imagen_lightning.types import Batch, InputError

log = logging.getLogger(__name__)

VERDICT = "verdict.json"
LOW_TIMES = (0.05, 0.1, 0.15)
HIGH_TIMES = (0.5, 0.7, 0.9)

# How these were found: docs/evaluation.md, "The first hour".
MIN_TEXT_Z = 3.0  # standard errors by which true captions must beat shuffled ones
MAX_DENOISING_RATIO = 0.5  # of the error that knowing each channel's mean and variance alone leaves
MAX_COLOUR_SHIFT = 4.0  # of 255


@dataclass(frozen=True)
class Findings:
    """What the probes measured.

    Attributes:
        text_gain: share of the error at HIGH_TIMES that true captions save against shuffled ones; None without text.
        text_z: its mean over samples in standard errors.
        denoising_ratio: error at LOW_TIMES over that of the best estimate from each pixel alone; 1 has learned nothing.
        colour_shift: mean distance of a channel's mean from the low-res input's, of 255; None for a base stage.
    """

    text_gain: float | None
    text_z: float | None
    denoising_ratio: float
    colour_shift: float | None

    def verdict(self) -> list[str]:
        """In words, one an ailment; empty where nothing ails."""
        words = []
        if self.denoising_ratio > MAX_DENOISING_RATIO:
            words.append(
                f"still noise at t<0.2: the error is {self.denoising_ratio:.2f} of that with no knowledge of "
                f"images (below {MAX_DENOISING_RATIO:g} is learning): keep training, or look at the learning rate"
            )
        if self.text_z is not None and self.colour_shift is None and self.text_z < MIN_TEXT_Z:
            words.append(
                f"text is ignored: true captions save {self.text_gain:.2%} of the error, {self.text_z:.1f} standard "
                f"errors (above {MIN_TEXT_Z:g} is heard): keep training; if it stays, look at the text settings"
            )
        if self.colour_shift is not None and self.colour_shift > MAX_COLOUR_SHIFT:
            words.append(
                f"colour drifts: outputs lie {self.colour_shift:.1f}/255 from their low-resolution input (below "
                f"{MAX_COLOUR_SHIFT:g} is faithful): keep training; with epsilon try v or x0"
            )
        return words


class Probes(pl.Callback):
    """Measures on the first validation samples what a loss does not tell, and says it in words.

    Logs `STAGE/text_gain`, `STAGE/text_z`, `STAGE/denoising_ratio` and, for super-resolution, `STAGE/colour_shift`; the
    verdict goes to the log when it changes and to RUN/verdict.json. The first process measures; training is the same to
    the bit as without.

    Args:
        num_samples: validation samples.
        num_drawn: images that a super-resolution stage draws for its colours.
        every_n_steps: optimizer steps between two measurements.
        at_end: whether to measure when training ends, unless a signal ended it.
        batch_size: samples at once.

    Raises:
        InputError: fewer than 8 samples or another number below 1; when training starts, no validation images.
    """

    def __init__(
        self,
        num_samples: int = 128,
        num_drawn: int = 16,
        every_n_steps: int = 1000,
        at_end: bool = True,
        batch_size: int = 32,
    ) -> None:
        if num_samples < 8 or min(num_drawn, every_n_steps, batch_size) < 1:
            raise InputError(
                f"Probes num_samples {num_samples} must be at least 8, num_drawn {num_drawn}, every_n_steps "
                f"{every_n_steps} and batch_size {batch_size} at least 1"
            )
        self.num_samples = num_samples
        self.num_drawn = num_drawn
        self.every_n_steps = every_n_steps
        self.at_end = at_end
        self.batch_size = batch_size
        self._given: Pictures | None = None
        self._seen_step = self._measured_step = 0
        self._said: list[str] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen_step = self._measured_step = trainer.global_step
        if not isinstance(pl_module, DiffusionMixin):
            raise InputError(f"Probes look at stages of a cascade; {type(pl_module).__name__} is none")
        if trainer.is_global_zero:
            self._given = validation_pictures(trainer, pl_module, self.num_samples, "Probes")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._seen_step and trainer.global_step % self.every_n_steps == 0:
            self._look(trainer, pl_module)
        self._seen_step = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.at_end and trainer.global_step > self._measured_step and interrupted(trainer) is None:
            self._look(trainer, pl_module)

    def _look(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        self._measured_step = trainer.global_step
        if self._given is None:
            return
        assert isinstance(stage, DiffusionMixin)
        findings = self._findings(trainer, stage, self._given)
        name, words = stage_name(stage), findings.verdict()
        numbers = {key: value for key, value in vars(findings).items() if value is not None}
        log_metrics(trainer, {f"{name}/{key}": value for key, value in numbers.items()})
        write_json(
            run_dir(trainer) / VERDICT,
            {"step": trainer.global_step, "stage": name, "findings": numbers, "verdict": words},
        )
        if words != self._said and (self._said is not None or words):
            for sentence in words or ["nothing ails any more"]:
                log.info("%s, step %d: %s", name, trainer.global_step, sentence)
        self._said = words

    def _findings(self, trainer: pl.Trainer, stage: Any, given: Pictures) -> Findings:
        assert given.truth is not None
        was_training = stage.training
        with (
            uncounted(trainer),
            untouched_rng(stage.device),
            averaged_weights(trainer, stage),
            trainer.precision_plugin.forward_context(),
            torch.no_grad(),
        ):
            stage.eval()
            try:
                low = self._errors(stage, given, LOW_TIMES, shuffled=False)
                gain = z = None
                if stage.text.encoder is not None:
                    true = self._errors(stage, given, HIGH_TIMES, shuffled=False).mean(1)
                    other = self._errors(stage, given, HIGH_TIMES, shuffled=True).mean(1)
                    saved = other - true
                    gain = float(saved.mean() / other.mean())
                    z = float(saved.mean() / (saved.std() / len(saved) ** 0.5).clamp(min=1e-12))
            finally:
                stage.train(was_training)
        ratio = float(low.mean(0).div(self._alone(stage, given, LOW_TIMES)).mean())
        shift = None
        if given.low_res is not None:
            rows = range(min(self.num_drawn, len(given.captions)))
            images, _ = draw(trainer, stage, given, DrawingSettings(batch_size=self.batch_size), rows)
            reduced = to_uint8(downsample(to_float(images), given.low_res.shape[-1])).double()
            shift = float((reduced.mean((2, 3)) - given.low_res[: len(rows)].double().mean((2, 3))).abs().mean())
        return Findings(gain, z, ratio, shift)

    def _errors(self, stage: Any, given: Pictures, times: tuple[float, ...], shuffled: bool) -> Tensor:
        """(N, T) float64 mean squared errors of x0, on noise that depends on the sample alone."""
        rows = []
        for start in range(0, len(given.captions), self.batch_size):
            images = given.truth[start : start + self.batch_size]  # type: ignore[index]
            places = torch.arange(start, start + len(images))
            others = (places + 1) % len(given.captions) if shuffled else places
            captions = [given.captions[place] for place in others.tolist()]
            batch = Batch(images, captions, [""] * len(images), places).to(stage.device)
            x0, conditioning = stage.condition(batch, VALIDATION_SEED, training=False)
            epsilon = normal(VALIDATION_SEED, Stream.NOISE, batch.positions, tuple(x0.shape[1:]))
            columns = []
            for time in times:
                t = torch.full((len(x0),), time, device=x0.device)
                x_t = stage.process.add_noise(x0, epsilon, t)
                estimate = stage.process.x0(stage.predict(x_t, t, conditioning), x_t, t)
                columns.append((estimate.double() - x0.double()).square().mean((1, 2, 3)))
            rows.append(torch.stack(columns, 1).cpu())
        return torch.cat(rows)

    def _alone(self, stage: Any, given: Pictures, times: tuple[float, ...]) -> Tensor:
        """(T,) the error of the best linear estimate of each pixel from itself: sigma^2 v / (alpha^2 v + sigma^2)."""
        variance = to_float(given.truth).double().var((0, 2, 3))  # type: ignore[arg-type]
        t = torch.tensor(times, dtype=torch.float64)
        alpha, sigma = (
            value.double()[:, None] for value in (stage.process.schedule.alpha(t), stage.process.schedule.sigma(t))
        )
        return (sigma**2 * variance / (alpha**2 * variance + sigma**2)).mean(1)
