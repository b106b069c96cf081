"""The loss by noise level and by augmentation level."""

from __future__ import annotations

from typing import Any

import torch

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

import lightning.pytorch as pl  # isort: skip
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # isort: skip

from imagen_lightning.callbacks.observer import Observer
from imagen_lightning.callbacks.processes import of_all_processes
from imagen_lightning.callbacks.run_folder import log_metrics
from imagen_lightning.callbacks.schedule import Schedule
from imagen_lightning.stages import StepRecord
from imagen_lightning.stages.means import Means
from imagen_lightning.types import InputError


class NoiseLevelLoss(Observer):
    """Logs the mean loss in bins of the time t (0 is data, 1 is noise) and of the augmentation level.

    `train/loss_t/0.00-0.10`, … are means since they were last logged; `val/loss_t/…` and, in super-resolution stages,
    `train/loss_aug/…` and `val/loss_aug/…` likewise. Means are over all processes.

    Args:
        num_bins: bins of [0, 1], at most 100.
        every_n_steps: optimizer steps between two loggings of the training loss.
        every_n_epochs: passes over the training data, in the place of steps.
        strict: end training where this fails, rather than log it and continue.

    Raises:
        InputError: a number out of range; when training starts, data without epochs where they are counted.
    """

    def __init__(
        self,
        num_bins: int = 10,
        every_n_steps: int = 100,
        every_n_epochs: float | None = None,
        strict: bool = False,
    ) -> None:
        if not 1 <= num_bins <= 100:
            raise InputError(f"NoiseLevelLoss num_bins {num_bins} must be in 1..100")
        self.num_bins = num_bins
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs
        self.strict = strict
        self._schedule = Schedule(every_n_steps, every_n_epochs, at_end=False)
        self._means = {(part, level): Means(num_bins) for part in ("train", "val") for level in ("loss_t", "loss_aug")}

    @property
    def _bin_names(self) -> list[str]:
        """The bins' names: "0.00-0.10", …"""
        width = 1 / self.num_bins
        return [f"{place * width:.2f}-{(place + 1) * width:.2f}" for place in range(self.num_bins)]

    def metric_names(self, stage: str) -> set[str]:
        """Return what may be logged of the stage of that name."""
        levels = ["loss_t"] if stage == "base" else ["loss_t", "loss_aug"]
        return {
            f"{part}/{level}/{bin_name}"
            for part, level in self._means
            if level in levels
            for bin_name in self._bin_names
        }

    def state_dict(self) -> dict[str, Any]:
        """Every process's sums since the training losses were last logged, (processes, 2, num_bins) by level."""
        own = {level: means.totals for (part, level), means in self._means.items() if part == "train"}
        everyone = of_all_processes({level: t.cpu() for level, t in own.items() if t is not None})
        empty = torch.zeros(2, self.num_bins, dtype=torch.float64)
        levels = {level for item in everyone for level in item}
        return {level: torch.stack([item.get(level, empty) for item in everyone]) for level in sorted(levels)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rank, num_processes = getattr(rank_zero_only, "rank", 0), len(of_all_processes(None))
        for level, totals in state_dict.items():
            parts = totals if totals.ndim == 3 else totals[None]  # an older checkpoint's, of all processes together
            self._means["train", level].restore(parts, rank, num_processes)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._schedule.start(trainer, "NoiseLevelLoss")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        with self.tolerating(trainer):
            self._add("train", pl_module)
        if self._schedule.is_due(trainer):
            with self.tolerating(trainer):
                self._log("train", trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.sanity_checking:
            with self.tolerating(trainer):
                self._add("val", pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            with self.tolerating(trainer):
                self._log("val", trainer, pl_module)

    def _add(self, part: str, pl_module: pl.LightningModule) -> None:
        record = getattr(pl_module, "record", None)
        if isinstance(record, StepRecord):
            for level, levels in (("loss_t", record.times), ("loss_aug", record.aug_level)):
                if levels is not None:
                    bins = (levels.float() * self.num_bins).long().clamp(0, self.num_bins - 1)
                    self._means[part, level].add(record.losses, bins)

    def _log(self, part: str, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = {
            f"{part}/{level}/{bin_name}": total / count
            for level in ("loss_t", "loss_aug")
            for bin_name, (total, count) in zip(
                self._bin_names, self._means[part, level].take(trainer.strategy, pl_module.device).T.tolist()
            )
            if count
        }
        if metrics:
            log_metrics(trainer, metrics)
