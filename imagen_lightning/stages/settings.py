"""The groups of settings that every stage shares; each is a plain section of a stage's YAML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from imagen_lightning.diffusion import (
    CosineSchedule,
    DiffusionProcess,
    EvenTimes,
    FixedVariance,
    LearnedRange,
    Parametrization,
    Plain,
    StaticThresholding,
    Thresholding,
    TrainingTimes,
    V,
    Weighting,
)
from imagen_lightning.samplers import DDIM, UniformTimes
from imagen_lightning.text import PseudoTokens
from imagen_lightning.text.kept import KeptStates
from imagen_lightning.types import Batch, InputError, Sampler, Schedule, Spacing, Text, TextEncoder

MOST_STEPS = 1_000_000  # of a sampling run


@dataclass
class Diffusion:
    """The forward process and what is learnt from it.

    Attributes:
        schedule: alpha and sigma over time; by default CosineSchedule.
        parametrization: what the network predicts; by default V.
        weighting: how much each noise level counts in the loss; by default Plain.
        times: at which times the network is trained; by default EvenTimes. Validation is always even.
        variance: LearnedRange for a network that gives channels for the variance as well, FixedVariance to leave them
            aside; None for a network without.
    """

    # None stands for the default: a configuration is written back as YAML, which cannot hold an object.
    schedule: Schedule = None  # type: ignore[assignment]
    parametrization: Parametrization = None  # type: ignore[assignment]
    weighting: Weighting = None  # type: ignore[assignment]
    times: TrainingTimes = None  # type: ignore[assignment]
    variance: LearnedRange | FixedVariance | None = None

    def __post_init__(self) -> None:
        self.schedule = self.schedule or CosineSchedule()
        self.parametrization = self.parametrization or V()
        self.weighting = self.weighting or Plain()
        self.times = self.times or EvenTimes()

    def process(self) -> DiffusionProcess:
        return DiffusionProcess(self.schedule, self.parametrization, self.weighting, self.times, self.variance)


@dataclass
class TextSettings:
    """How captions reach the network.

    Attributes:
        encoder: frozen; no submodule of the stage, so that neither checkpoints nor the EMA hold it. Null for an
            unconditional stage.
        network: trained with the stage over the encoder's states, e.g. a TransformerEncoder.
        drop: share of the captions replaced by the null text in training, per sample.
        null_text: the text of no caption: "zero" (Imagen), "learned", or "empty_caption" (DeepFloyd IF).
        tokens: new words for the encoder, trained with the stage (textual inversion).
        kept: no setting: what stands in for the encoder where a callback has had all captions encoded.
    """

    encoder: TextEncoder | None = None
    network: nn.Module | None = None
    drop: float = 0.1
    null_text: str = "zero"
    tokens: PseudoTokens | None = None
    kept: KeptStates | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.null_text not in ("zero", "learned", "empty_caption"):
            raise InputError(f"null_text {self.null_text!r} is unknown; use 'zero', 'learned' or 'empty_caption'")
        if not 0 <= self.drop <= 1:
            raise InputError(f"text drop {self.drop} must be in [0, 1]")
        if self.network is not None and not (hasattr(self.network, "input_dim") and hasattr(self.network, "dim")):
            raise InputError(
                f"text network {type(self.network).__name__} does not read text: it has no input_dim and dim; use "
                "TransformerEncoder or your own"
            )
        if self.network is not None and self.encoder is not None and self.network.input_dim != self.encoder.dim:
            raise InputError(
                f"text network's input_dim is {self.network.input_dim}; text encoder {self.encoder.name} gives "
                f"{self.encoder.dim} features"
            )
        if self.tokens is not None:
            if self.encoder is None:
                raise InputError(f"pseudo-words {', '.join(self.tokens.words)} need a text encoder; give text.encoder")
            self.tokens.attach(self.encoder)

    def encode(self, captions: Sequence[str], device: torch.device) -> Text:
        """B captions' text, as `network` takes it; kept states where there are any."""
        assert self.encoder is not None
        if self.kept is not None:
            return self.kept(captions, device)
        if self.tokens is None:
            return self.encoder(captions, device)
        return self.tokens.read(self.encoder, captions, device)

    def encode_batch(self, batch: Batch) -> Text:
        """A batch's text: its stored states, or else its captions'.

        Raises:
            InputError: states were stored of a caption that has a new word.
        """
        if batch.text is None:
            return self.encode(batch.captions, batch.images.device)
        if self.tokens is not None:
            self.tokens.refuse_stored(batch.captions)
        return batch.text

    @property
    def dim(self) -> int | None:
        """D of the text that the stage's network sees, None for no text."""
        if self.encoder is None:
            return None
        return self.network.dim if self.network is not None else self.encoder.dim  # type: ignore[return-value]


@dataclass
class Execution:
    """How the network runs.

    Attributes:
        channels_last: keep its weights and images channels-last in memory.
        compile: run it through torch.compile; the first step then takes a minute or more.
    """

    channels_last: bool = False
    compile: bool = False


@dataclass
class Sampling:
    """How the stage is sampled where nothing else is asked for; kept in the cascade's manifest.

    Attributes:
        sampler: the algorithm; by default DDIM.
        num_steps: network evaluations an image.
        guidance: classifier-free guidance weight, 1 for none; None is the stage's own, 3 of a base stage and 1 of
            super-resolution.
        thresholding: what keeps x0 in range at each step; by default StaticThresholding (NoThresholding for nothing).
        spacing: where along the time the steps lie; by default UniformTimes.
        guidance_interval: (low, high) of the noise level sigma / alpha, within which guidance acts; None for all.
        guidance_rescale: in [0, 1], how far guided images are brought back to the spread of unguided ones.
    """

    sampler: Sampler = None  # type: ignore[assignment]
    num_steps: int = 50
    guidance: float = None  # type: ignore[assignment]
    thresholding: Thresholding = None  # type: ignore[assignment]
    spacing: Spacing = None  # type: ignore[assignment]
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        self.sampler = self.sampler or DDIM()
        self.thresholding = self.thresholding or StaticThresholding()
        self.spacing = self.spacing or UniformTimes()
        if not 1 <= self.num_steps <= MOST_STEPS:
            raise InputError(f"sampling num_steps {self.num_steps} must be in [1, {MOST_STEPS}]")
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if not 0 <= low < high:
                raise InputError(f"guidance_interval from {low} to {high} must rise from 0 or above")
            self.guidance_interval = (low, high)
        if not 0 <= self.guidance_rescale <= 1:
            raise InputError(f"guidance_rescale {self.guidance_rescale} must be in [0, 1]")
