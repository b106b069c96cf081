"""Stops a run at a loss that is not finite, with what it was computed from on disk."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

import lightning.pytorch as pl  # isort: skip

from imagen_lightning.callbacks.checkpoint import find_last
from imagen_lightning.callbacks.run_folder import run_dir
from imagen_lightning.files import write_json
from imagen_lightning.stages import StepRecord
from imagen_lightning.types import Batch

FOLDER = "non_finite"


class NonFiniteLossError(RuntimeError):
    """The loss of a training step is NaN or infinite."""


class FiniteLoss(pl.Callback):
    """Ends training at a loss that is not finite, before its gradients reach the weights.

    RUN/non_finite/step-N.json then holds the batch's keys, positions, captions, times, augmentation levels and losses;
    the weights are those of step N and the last checkpoint is untouched.

    Raises:
        NonFiniteLossError: in training; it names the file, the worst sample with its noise level, and what to try.
    """

    def __init__(self) -> None:
        self._batch: Batch | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch if isinstance(batch, Batch) else None

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if bool(loss.isfinite()):
            return
        record = getattr(pl_module, "record", None)
        details = self._details(pl_module, record) if isinstance(record, StepRecord) else {}
        rank = f"-rank-{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = run_dir(trainer) / FOLDER / f"step-{trainer.global_step}{rank}.json"
        write_json(path, {"step": trainer.global_step, "loss": loss.item(), **details})
        last = find_last(run_dir(trainer))
        raise NonFiniteLossError(
            f"the loss is {loss.item()} after step {trainer.global_step}{_worst(details)}; {path} lists the batch. The "
            f"weights are untouched and {f'{last} is whole' if last else 'no checkpoint was written yet'}. Look at "
            "that sample; else try a lower learning rate, trainer.gradient_clip_val 1.0, or precision bf16-mixed or "
            "32-true"
        )

    def _details(self, pl_module: pl.LightningModule, record: StepRecord) -> dict[str, Any]:
        details: dict[str, Any] = {"keys": record.keys}
        if self._batch is not None and self._batch.keys == record.keys:
            details |= {"positions": self._batch.positions.tolist(), "captions": self._batch.captions}
        details |= {"times": record.times.tolist(), "losses": record.losses.tolist()}
        details["log_snr"] = pl_module.process.schedule.log_snr(record.times).tolist()  # type: ignore[union-attr,operator]
        if record.aug_level is not None:
            details["aug_levels"] = record.aug_level.tolist()
        return details


def _worst(details: dict[str, Any]) -> str:
    if not details:
        return ""
    losses = details["losses"]
    worst = max(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
    level = f", augmentation level {details['aug_levels'][worst]:.3f}" if "aug_levels" in details else ""
    return (
        f", worst in sample {details['keys'][worst]!r} (loss {losses[worst]:g}, t {details['times'][worst]:.4f}, "
        f"log-SNR {details['log_snr'][worst]:.2f}{level})"
    )
