"""What a stage has learned so far, in words: whether it hears its text, denoises, and keeps colours."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

import lightning.pytorch as pl  # isort: skip

from imagen_lightning.callbacks.drawing import DrawingSettings, Pictures, draw, first_pictures, require_stage
from imagen_lightning.callbacks.ema import averaged_weights
from imagen_lightning.callbacks.observer import Observer, together
from imagen_lightning.callbacks.rng import untouched_rng
from imagen_lightning.callbacks.run_folder import run_dir
from imagen_lightning.callbacks.schedule import Schedule
from imagen_lightning.callbacks.throughput import uncounted
from imagen_lightning.callbacks.values import column, column_of, log_values, rewind_values, stage_name
from imagen_lightning.files import write_json
from imagen_lightning.metrics.digests import digest_tensors, digest_texts
from imagen_lightning.metrics.probes import (
    HIGH_TIMES,
    LOW_TIMES,
    colour_shift,
    denoising_ratios,
    text_gains,
    z_score,
)
from imagen_lightning.metrics.protocol import Protocol, Value
from imagen_lightning.metrics.values import mean_value
from imagen_lightning.stages.mixin import VALIDATION_SEED
from imagen_lightning.types import InputError

log = logging.getLogger(__name__)

VERDICT = "verdict.json"

# How these were found: docs/how-to/evaluation.md, "The first hour".
MIN_TEXT_GAIN = 0.002  # share of the error that true captions must save against shuffled ones, …
MIN_TEXT_Z = 3.0  # … and in standard errors
MAX_DENOISING_RATIO = 0.5  # of the error that knowing each channel's mean and variance alone leaves
MAX_IGNORED_GAIN = 0.02  # text is surely ignored where the gain's 95% interval ends below
MAX_COLOUR_SHIFT = 5.0  # of 255
_ADVICE = {"above": "keep training", "unclear": "keep training, or take more samples"}


@dataclass(frozen=True)
class Findings:
    """What the probes measured, one number a sample; see `imagen_lightning.metrics.probes`.

    Attributes:
        denoising_ratios: (N,) error at LOW_TIMES over that of the best estimate of a pixel from itself.
        text_gains: (M,) fraction of the error at HIGH_TIMES that images' own captions save against others'; None for a
            stage without text; fewer than 2 where the captions are the same.
        colour_shifts: (D,) distance of an output's colours from the low-res input's, of 255; None for a base stage.
    """

    denoising_ratios: Tensor
    text_gains: Tensor | None
    colour_shifts: Tensor | None

    def verdict(self) -> list[str]:
        """In words, one a fault, and one for what cannot be told from so few samples; empty where all is well."""
        ratio, words = float(self.denoising_ratios.mean()), []
        if not math.isfinite(ratio):
            return ["the weights give no finite images: go back to an earlier checkpoint with a lower learning rate"]
        noise = _side(self.denoising_ratios, MAX_DENOISING_RATIO)
        if noise != "below":
            head = "still noise at t<0.2" if noise == "above" else "whether noise at t<0.2 is removed cannot be told"
            words.append(
                f"{head}: the error is {ratio:.2f} of that with no knowledge of images (below "
                f"{MAX_DENOISING_RATIO:g} is learning): {_ADVICE[noise]}, or look at the learning rate"
            )
        if self.text_gains is not None and self.colour_shifts is None:
            words += self._of_text(self.text_gains)
        if self.colour_shifts is not None:
            shift, drift = float(self.colour_shifts.mean()), _side(self.colour_shifts, MAX_COLOUR_SHIFT)
            if drift != "below":
                head = "colour drifts" if drift == "above" else "whether colour drifts cannot be told"
                words.append(
                    f"{head}: outputs lie {shift:.1f}/255 from their low-resolution input (below "
                    f"{MAX_COLOUR_SHIFT:g} is faithful): {_ADVICE[drift]}; if it stays, predict x0, which shifts "
                    "them least"
                )
        return words

    def _of_text(self, gains: Tensor) -> list[str]:
        """Whether the stage hears its text; it surely does not where a gain that matters is ruled out."""
        if len(gains) < 2:
            return ["whether text is heard cannot be told: the captions that were looked at are the same"]
        gain, z = float(gains.mean()), z_score(gains)
        if z >= MIN_TEXT_Z and gain >= MIN_TEXT_GAIN:
            return []
        sure = gain < MIN_TEXT_GAIN and z >= MIN_TEXT_Z
        ignored = sure or _side(gains, MAX_IGNORED_GAIN) == "below"
        head = "text is ignored" if ignored else "whether text is heard cannot be told"
        return [
            f"{head}: true captions save {gain:.2%} of the error, {z:.1f} standard errors (above "
            f"{MIN_TEXT_GAIN:.1%} and {MIN_TEXT_Z:g} is heard): {_ADVICE['above' if ignored else 'unclear']}; if it "
            "stays, look at the captions and text settings"
        ]

    def values(self, protocol: Protocol, drawn: Mapping[str, Any]) -> list[Value]:
        """Each number with its interval and a protocol, to which `drawn` adds how images were drawn."""
        low, high = (f"t {', '.join(map(str, times))}" for times in (LOW_TIMES, HIGH_TIMES))
        found = [mean_value("denoising ratio", self.denoising_ratios, replace(protocol, settings=low))]
        if self.text_gains is not None and len(self.text_gains) > 1:
            at_high = replace(protocol, settings=high, num_samples=len(self.text_gains))
            z = Value("text z", z_score(self.text_gains), None, None, replace(at_high, metric="text z"))
            found += [mean_value("text gain", self.text_gains, at_high), z]
        if self.colour_shifts is not None:
            found.append(mean_value("colour shift", self.colour_shifts, replace(protocol, **drawn)))
        return found


class Probes(Observer):
    """Measures on the first validation samples what a loss does not tell, and says it in words.

    Logs `STAGE/denoising_ratio`, `STAGE/text_gain`, `STAGE/text_z` and, for super-resolution, `STAGE/colour_shift`; the
    verdict goes to the log when other things ail than before, and to RUN/verdict.json. The first process measures;
    training is the same to the bit as without.

    Args:
        num_samples: validation samples.
        num_drawn: images that a super-resolution stage draws for its colours.
        every_n_steps: optimizer steps between two measurements.
        every_n_epochs: passes over the training data, in the place of steps.
        at_end: whether to measure when training ends, unless a signal ended it.
        num_steps: network evaluations an image drawn; by default the stage's own.
        batch_size: samples at once.
        strict: end training where this fails, rather than log it and continue.

    Raises:
        InputError: fewer than 16 samples or another number below its least; when training starts, no validation images.
    """

    def __init__(
        self,
        num_samples: int = 128,
        num_drawn: int = 16,
        every_n_steps: int = 1000,
        every_n_epochs: float | None = None,
        at_end: bool = True,
        num_steps: int | None = None,
        batch_size: int = 32,
        strict: bool = False,
    ) -> None:
        if num_samples < 16 or num_drawn < 2:
            raise InputError(f"Probes num_samples {num_samples} must be at least 16, num_drawn {num_drawn} at least 2")
        self.num_samples = num_samples
        self.num_drawn = num_drawn
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs
        self.at_end = at_end
        self.num_steps = num_steps
        self.batch_size = batch_size
        self.strict = strict
        self._schedule = Schedule(every_n_steps, every_n_epochs, at_end)
        self._settings = DrawingSettings(num_steps=num_steps, batch_size=batch_size)
        self._given: Pictures | None = None  # in the first process
        self._reference = ""
        self._said: list[str] = []

    def metric_names(self, stage: str) -> set[str]:
        """Return what may be logged of the stage of that name."""
        more = () if stage == "base" else ("colour shift",)
        return {column_of(stage, metric) for metric in ("denoising ratio", "text gain", "text z", *more)}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        require_stage(trainer, pl_module, "Probes")
        self._schedule.start(trainer, "Probes")
        rewind_values(trainer)
        together(lambda: self._find(trainer, pl_module))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._schedule.is_due(trainer):
            with self.tolerating(trainer):
                self._look(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._schedule.is_due_at_end(trainer):
            with self.tolerating(trainer):
                self._look(trainer, pl_module)

    def _find(self, trainer: pl.Trainer, stage: Any) -> None:
        if trainer.is_global_zero:
            self._given = first_pictures(trainer, stage, self.num_samples, "Probes")
            self._reference = digest_tensors([self._given.truth])  # type: ignore[list-item]
            self._said = _rewind_verdict(trainer)
            if len(self._given) < 2:
                raise InputError("Probes need at least 2 validation images")

    def _look(self, trainer: pl.Trainer, stage: Any) -> None:
        if self._given is None:
            return
        findings, averaged = self._findings(trainer, stage, self._given)
        name, words = stage_name(stage), findings.verdict()
        protocol = Protocol(
            "probe",
            image_size=stage.image_size,
            prompts=digest_texts(self._given.captions),
            reference=self._reference,
            reference_name="validation images",
            weights="ema" if averaged else "raw",
            precision=str(trainer.precision),
        )
        values = findings.values(protocol, self._settings.protocol(stage))
        log_values(trainer, {column(stage, value.metric): value for value in values})
        content = {"step": trainer.global_step, "stage": name, "verdict": words}
        write_json(run_dir(trainer) / VERDICT, content)
        if _ailments(words) != _ailments(self._said):
            for sentence in words or ["nothing ails any more"]:
                log.warning("%s, step %d: %s", name, trainer.global_step, sentence)
        self._said = words

    def _findings(self, trainer: pl.Trainer, stage: Any, given: Pictures) -> tuple[Findings, bool]:
        was_training, batches = stage.training, given.batches(self.batch_size)
        with (
            uncounted(trainer),
            untouched_rng(stage.device),
            averaged_weights(trainer, stage) as averaged,
            trainer.precision_plugin.forward_context(),
            torch.no_grad(),
        ):
            stage.eval()
            try:
                ratios = denoising_ratios(stage, batches, VALIDATION_SEED)
                hears = stage.text.encoder is not None
                gains = text_gains(stage, batches, VALIDATION_SEED) if hears else None
            finally:
                stage.train(was_training)
        shifts = None
        if given.low_res is not None:
            drawn = given.part(slice(self.num_drawn))
            images, _ = draw(trainer, stage, drawn, self._settings)
            shifts = colour_shift(images, drawn.low_res)  # type: ignore[arg-type]
        return Findings(ratios, gains, shifts), averaged


def _side(numbers: Tensor, limit: float) -> str:
    """Whether the mean of N numbers is "above" or "below" a limit, or "unclear" where its 95% interval holds it."""
    mean = float(numbers.mean())
    reach = 1.96 * float(numbers.std()) / len(numbers) ** 0.5 if len(numbers) > 1 else math.inf
    return "above" if mean - reach > limit else "below" if mean + reach < limit else "unclear"


def _ailments(words: Sequence[str]) -> list[str]:
    """What ails, without the numbers."""
    return [sentence.partition(":")[0] for sentence in words]


def _rewind_verdict(trainer: pl.Trainer) -> list[str]:
    """What was said last; that of a later step than the trainer's, which a resumed run takes again, is dropped."""
    path = run_dir(trainer) / VERDICT
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["step"] <= trainer.global_step:
            return list(content["verdict"])
    except (ValueError, TypeError, KeyError):
        log.warning("%s was no verdict and is dropped", path)
    path.unlink()
    return []
