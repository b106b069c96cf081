"""The loss by noise level and by augmentation level."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

import lightning.pytorch as pl  # isort: skip
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # isort: skip

from imagen_lightning.callbacks.processes import of_all_processes
from imagen_lightning.callbacks.run_folder import log_metrics
from imagen_lightning.callbacks.schedule import Schedule
from imagen_lightning.stages import StepRecord
from imagen_lightning.types import InputError


class LevelMeans:
    """Mean losses in equal bins of a level in [0, 1].

    Args:
        num_bins: how many bins.
    """

    def __init__(self, num_bins: int) -> None:
        self.num_bins = num_bins
        self.totals: Tensor | None = None  # (2, num_bins): sums of losses, numbers of samples

    def add(self, levels: Tensor, losses: Tensor) -> None:
        """Takes in (B,) levels and losses; waits for no device."""
        bins = (levels.float() * self.num_bins).long().clamp(0, self.num_bins - 1)
        new = torch.zeros(2, self.num_bins, device=losses.device)
        new[0].index_add_(0, bins, losses.float())
        new[1].index_add_(0, bins, torch.ones_like(losses, dtype=torch.float32))
        self.totals = new if self.totals is None else self.totals.to(new.device) + new

    @property
    def names(self) -> list[str]:
        """The bins' names: "0.00-0.10", …"""
        width = 1 / self.num_bins
        return [f"{i * width:.2f}-{(i + 1) * width:.2f}" for i in range(self.num_bins)]

    def pop(self, trainer: pl.Trainer, device: torch.device) -> dict[str, float]:
        """The means over all processes by bin ("0.00-0.10"), without empty bins; begins anew. All processes call it."""
        totals, self.totals = self.totals, None
        if totals is None:
            totals = torch.zeros(2, self.num_bins, device=device)
        sums, counts = trainer.strategy.reduce(totals, reduce_op="sum").tolist()  # type: ignore[union-attr]
        return {name: sums[i] / counts[i] for i, name in enumerate(self.names) if counts[i]}


class NoiseLevelLoss(pl.Callback):
    """Logs the mean loss in bins of the time t (0 is data, 1 is noise) and of the augmentation level.

    `train/loss_t/0.00-0.10`, … are means since they were last logged; `val/loss_t/…` and, in super-resolution stages,
    `train/loss_aug/…` and `val/loss_aug/…` likewise. Means are over all processes.

    Args:
        num_bins: bins of [0, 1], at most 100.
        every_n_steps: optimizer steps between two loggings of the training loss.
        every_n_epochs: passes over the training data, in the place of steps.

    Raises:
        InputError: a number out of range; when training starts, data without epochs where they are counted.
    """

    def __init__(self, num_bins: int = 10, every_n_steps: int = 100, every_n_epochs: float | None = None) -> None:
        if not 1 <= num_bins <= 100:
            raise InputError(f"NoiseLevelLoss num_bins {num_bins} must be in 1..100")
        self.num_bins = num_bins
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs
        self._schedule = Schedule(every_n_steps, every_n_epochs, at_end=False)
        self._means = {
            (part, level): LevelMeans(num_bins) for part in ("train", "val") for level in ("loss_t", "loss_aug")
        }

    def metric_names(self, stage: str) -> set[str]:
        """Return what may be logged of the stage of that name."""
        levels = ["loss_t"] if stage == "base" else ["loss_t", "loss_aug"]
        return {
            f"{part}/{level}/{bin_name}"
            for (part, level), means in self._means.items()
            if level in levels
            for bin_name in means.names
        }

    def state_dict(self) -> dict[str, Any]:
        """The sums since the training losses were last logged, over all processes, so that a resumed run goes on."""
        own = {level: means.totals for (part, level), means in self._means.items() if part == "train"}
        everyone = of_all_processes({level: t.cpu() for level, t in own.items() if t is not None})
        return {level: sum(item[level] for item in everyone if level in item) for level in own if level in everyone[0]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for level, totals in state_dict.items():
            if totals.shape[1] == self.num_bins and getattr(rank_zero_only, "rank", 0) == 0:
                self._means["train", level].totals = totals

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._schedule.start(trainer, "NoiseLevelLoss")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._add("train", pl_module)
        if self._schedule.is_due(trainer):
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
            self._add("val", pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._log("val", trainer, pl_module)

    def _add(self, part: str, pl_module: pl.LightningModule) -> None:
        record = getattr(pl_module, "record", None)
        if isinstance(record, StepRecord):
            self._means[part, "loss_t"].add(record.times, record.losses)
            if record.aug_level is not None:
                self._means[part, "loss_aug"].add(record.aug_level, record.losses)

    def _log(self, part: str, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = {
            f"{part}/{level}/{bin_name}": mean
            for level in ("loss_t", "loss_aug")
            for bin_name, mean in self._means[part, level].pop(trainer, pl_module.device).items()
        }
        if metrics:
            log_metrics(trainer, metrics)
