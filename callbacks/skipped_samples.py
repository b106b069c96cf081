"""How many samples the data left out, by reason, in the run's loggers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

import lightning.pytorch as pl  # isort: skip

from imagen_lightning.callbacks.observer import Observer
from imagen_lightning.callbacks.run_folder import log_metrics
from imagen_lightning.data.skips import Reason, SkipLog
from imagen_lightning.types import InputError

_REASONS = list(Reason)


class SkippedSamples(Observer):
    """Logs `data/skipped/REASON` and, of the validation set, `data/skipped_val/REASON`, in lower case with underscores.

    The numbers are samples met so far: each once a process, over all processes, those that the walk through the shards
    found once. They are logged where they have changed, every so many steps, and at the end; where that is an error, of
    the first process alone. Data that keeps no count logs nothing.

    Args:
        every_n_steps: optimizer steps between two loggings.
        strict: end training where this fails, rather than log it and continue.
    """

    def __init__(self, every_n_steps: int = 50, strict: bool = False) -> None:
        if every_n_steps < 1:
            raise InputError(f"SkippedSamples every_n_steps {every_n_steps} must be at least 1")
        self.every_n_steps = every_n_steps
        self.strict = strict
        self._found: dict[str, Counter[str]] = {}  # by the walk, the same in each process
        self._logged: dict[str, float] = {}
        self._seen_step = 0

    def metric_names(self, stage: str) -> set[str]:
        """Return what may be logged of any stage."""
        return {f"data/{name}/{reason.name.lower()}" for name in ("skipped", "skipped_val") for reason in _REASONS}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._found = {name: Counter(skips.counts) for name, skips in _skip_logs(trainer).items()}
        self._logged = {}
        self._seen_step = trainer.global_step
        with self.tolerating(trainer):
            self._log(trainer, self._total(trainer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = trainer.global_step > self._seen_step
        self._seen_step = trainer.global_step
        if stepped and trainer.global_step % self.every_n_steps == 0:
            with self.tolerating(trainer):
                self._log(trainer, self._total(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with self.tolerating(trainer):
            self._log(trainer, self._total(trainer))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._found:  # the other processes may have gone: nothing can be asked of them
            with self.tolerating(trainer):
                self._log(trainer, {name: Counter(skips.counts) for name, skips in _skip_logs(trainer).items()})

    def _total(self, trainer: pl.Trainer) -> dict[str, Counter[str]]:
        """The counts over all processes."""
        total = {}
        for name, skips in _skip_logs(trainer).items():
            found = self._found[name]
            met = torch.tensor([skips.counts[reason.value] - found[reason.value] for reason in _REASONS])
            met = trainer.strategy.reduce(met.to(trainer.strategy.root_device), reduce_op="sum")
            total[name] = Counter({reason.value: int(n) for reason, n in zip(_REASONS, met.tolist())}) + found
        return total

    def _log(self, trainer: pl.Trainer, counts: dict[str, Counter[str]]) -> None:
        metrics = {
            f"data/{name}/{reason.name.lower()}": float(numbers[reason.value])
            for name, numbers in counts.items()
            for reason in _REASONS
            if numbers[reason.value]
        }
        if metrics != self._logged:
            log_metrics(trainer, metrics)
            self._logged = metrics


def _skip_logs(trainer: pl.Trainer) -> dict[str, SkipLog]:
    data = trainer.datamodule  # type: ignore[attr-defined]
    found = {"skipped": getattr(data, "train_skips", None), "skipped_val": getattr(data, "val_skips", None)}
    return {name: skips for name, skips in found.items() if isinstance(skips, SkipLog)}
