"""Captions are encoded once, before training, and the text encoder's memory is given back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

import lightning.pytorch as pl  # isort: skip

from imagen_lightning.stages import DiffusionMixin
from imagen_lightning.text.kept import KeptStates
from imagen_lightning.types import InputError

log = logging.getLogger(__name__)


class EncodeOnce(pl.Callback):
    """Has the stage's text encoder run once over every caption of the data, then frees its weights.

    Before the first step the captions of training and validation, the empty one, and the prompts of other callbacks are
    encoded on the device that the stage will train on, before the stage is there. Their states stay in main memory, in
    float32, and take the encoder's place in training, validation and callbacks; a caption that nobody
    named has the encoder loaded again and freed. Checkpoints and what is trained are the same. Where the data gives
    stored text states, the prompts alone are encoded. Each process encodes for itself.

    Args:
        captions: further ones, such as those of callbacks of your own.
        max_gb: gigabytes (2^30) of memory that the states may take.
        device: where the encoder runs; None is where the stage trains.

    Raises:
        InputError: when training starts, a stage without text or with pseudo-words, which are trained through the
            encoder; data that cannot list its captions; states that take too much memory.
    """

    def __init__(self, captions: Sequence[str] = (), max_gb: float = 4.0, device: str | None = None) -> None:
        if not max_gb > 0:
            raise InputError(f"EncodeOnce max_gb {max_gb} must be above 0")
        self.captions = captions
        self.max_gb = max_gb
        self.device = device

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, DiffusionMixin) or pl_module.text.encoder is None:
            raise InputError("EncodeOnce: there is no text encoder to free; drop it")
        if pl_module.text.tokens is not None:
            raise InputError("EncodeOnce: pseudo-words are trained through the text encoder, which must stay; drop it")
        device = torch.device(self.device) if self.device is not None else trainer.strategy.root_device
        kept = KeptStates(pl_module.text.encoder, round(self.max_gb * 2**30), self.device)
        count = kept.keep([*_data_captions(trainer), "", *_prompts(trainer), *self.captions], device)
        pl_module.text.kept = kept
        log.info("encoded %d captions once (%.1f MiB) and freed the encoder", count, kept.num_bytes / 2**20)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if isinstance(pl_module, DiffusionMixin):
            pl_module.text.kept = None


def _data_captions(trainer: pl.Trainer) -> list[str]:
    listed: Any = getattr(trainer.datamodule, "captions", None)  # type: ignore[attr-defined]
    if listed is None:
        raise InputError("EncodeOnce asks the DataModule for its `captions()`, which this one lacks; drop EncodeOnce")
    return list(listed())


def _prompts(trainer: pl.Trainer) -> list[str]:
    """What the run's callbacks draw."""
    found = (getattr(callback, "prompts", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return [prompt for prompts in found if isinstance(prompts, list | tuple) for prompt in prompts]
