"""An exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

import lightning.pytorch as pl  # isort: skip
from lightning.pytorch.callbacks import WeightAveraging  # isort: skip

from imagen_lightning.components import describe_args
from imagen_lightning.types import InputError


class EMA(WeightAveraging):
    """Keeps an exponential moving average of the weights, used in validation, for samples and after training.

    After the first optimizer step the average is the weights themselves; after each further one it is
    d * average + (1 - d) * weights, d = min(decay, (1 + n) / (10 + n)) with n the number of averaged steps so far. n is
    saved, so a resumed run has the average of the uninterrupted one.

    In a checkpoint `state_dict` is the average and `current_model_state` the trained weights, wherever it is saved: the
    two are exchanged, never lost, during validation and after training. Inside validation and once training has ended
    the module holds the average.

    Weights that are not trained are their own average, in the same memory.

    Args:
        decay: the largest d, in [0, 1).
        device: where the average lies: null for that of the weights, or "cpu", which saves a GPU's memory and costs a
            copy of the weights after each step.
    """

    def __init__(self, decay: float = 0.9999, device: str | None = None) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"EMA decay {decay} must be in [0, 1)")
        if device not in (None, "cpu"):
            raise InputError(f"EMA device {device!r} is unknown; use null (that of the weights) or 'cpu'")
        super().__init__(use_buffers=False, multi_avg_fn=self._average)
        self.decay = decay
        self.device = device
        self.swapped = False
        self._swapped_for_validation = False

    @property
    def record(self) -> dict[str, Any]:
        """What the average is, for manifests and protocols: its kind and its arguments."""
        return {"kind": "ema", **describe_args(self, skip=("device",))}

    def decay_at(self, num_averaged: int) -> float:
        """The decay of the update that follows `num_averaged` updates."""
        return min(self.decay, (1 + num_averaged) / (10 + num_averaged))

    @torch.no_grad()
    def _average(self, averages: list[Tensor], weights: list[Tensor], num_averaged: Tensor | int) -> None:
        torch._foreach_lerp_(averages, weights, 1.0 - self.decay_at(int(num_averaged)))

    def swap(self, pl_module: pl.LightningModule) -> None:
        """Exchanges the module's weights and the average."""
        self._swap_models(pl_module)
        self.swapped = not self.swapped
        pl_module.weights_record = self.record if self.swapped else {"kind": "raw"}  # type: ignore[assignment]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            # Lightning would convert the weights only after the average was made and a checkpoint loaded.
            trainer.precision_plugin.convert_module(pl_module)
            _check_exact(pl_module)
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.swapped = self._swapped_for_validation = False
            # First, wherever it was listed: what looks at the average after a step is to see that step's.
            others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
            trainer.callbacks = [self, *others]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning makes the average before it moves the weights to their device, and leaves it behind.
        assert self._average_model is not None
        self._average_model.to(self.device or pl_module.device)
        for average, weight in zip(self._average_model.module.parameters(), pl_module.parameters()):
            if not weight.requires_grad and average.device == weight.device:
                average.data = weight.data

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._average_model is not None and not self.swapped:
            self.swap(pl_module)
            self._swapped_for_validation = True

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._swapped_for_validation:
            self.swap(pl_module)
            self._swapped_for_validation = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.on_validation_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning copies the average over the weights, which would be lost to a checkpoint saved later.
        if not self.swapped:
            self.swap(pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._average_model is not None:
            checkpoint["weights_record"] = self.record
        if self.swapped:
            average, weights = checkpoint["current_model_state"], checkpoint["state_dict"]
            checkpoint["state_dict"], checkpoint["current_model_state"] = average, weights


def _check_exact(pl_module: pl.LightningModule) -> None:
    """Raises InputError where trained weights are of a type that an average would be lost in."""
    for name, parameter in pl_module.named_parameters():
        exact = parameter.dtype in (torch.float32, torch.float64) or not parameter.requires_grad
        if parameter.is_floating_point() and not exact:
            raise InputError(
                f"EMA of {parameter.dtype} weights ({name}) would lose its small updates; train with "
                "trainer.precision bf16-mixed, which keeps float32 weights"
            )


@contextmanager
def averaged_weights(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[bool]:
    """The module with the weights it is judged by: the trainer's EMA where it has one, its own otherwise.

    Yields:
        Whether the weights are an average. The trained weights are back afterwards, also after an error. Inside
        validation and after training, where the module holds the average already, nothing moves.
    """
    ema = next((callback for callback in trainer.callbacks if isinstance(callback, EMA)), None)  # type: ignore[attr-defined]
    if ema is None or ema._average_model is None or ema.swapped:
        yield ema is not None and ema.swapped
        return
    ema.swap(pl_module)
    try:
        yield True
    finally:
        ema.swap(pl_module)
