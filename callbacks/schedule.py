"""When a callback looks at a stage: every n optimizer steps or passes over the data, and when training ends."""

from __future__ import annotations

import math

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

import lightning.pytorch as pl  # isort: skip

from imagen_lightning.callbacks.checkpoint import interrupted
from imagen_lightning.data.positioned import PositionedDataModule
from imagen_lightning.types import InputError


class Schedule:
    """Says after which optimizer steps something is due.

    Args:
        every_n_steps: optimizer steps between two times.
        every_n_epochs: passes over the training data, in the place of steps; None counts steps.
        at_end: whether it is due when training ends, unless a signal ended it.

    Raises:
        InputError: no steps, no epochs; at the start, data without epochs.
    """

    def __init__(self, every_n_steps: int, every_n_epochs: float | None = None, at_end: bool = True) -> None:
        if every_n_steps < 1 or (every_n_epochs is not None and not 0 < every_n_epochs < math.inf):
            raise InputError(
                f"every_n_steps {every_n_steps} must be at least 1, every_n_epochs {every_n_epochs} above 0 or null"
            )
        self._every_n_steps = every_n_steps
        self._every_n_epochs = every_n_epochs
        self._at_end = at_end
        self._period: float = every_n_steps
        self._seen_step = 0
        self._due_step: int | None = None

    def start(self, trainer: pl.Trainer, who: str) -> None:
        """To be called when training starts; `who` is the callback's name, for errors."""
        self._seen_step, self._due_step = trainer.global_step, None
        if self._every_n_epochs is not None:
            self._period = self._every_n_epochs * _steps_an_epoch(trainer, who)

    def is_due(self, trainer: pl.Trainer) -> bool:
        """To be asked once at the end of every batch."""
        step, seen, self._seen_step = trainer.global_step, self._seen_step, trainer.global_step
        if step == seen or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return False  # gradients are still accumulating
        due = math.floor(step / self._period) > math.floor((step - 1) / self._period)
        if due:
            self._due_step = step
        return due

    def is_due_at_end(self, trainer: pl.Trainer) -> bool:
        """To be asked when training ends. A run that starts at its end makes up for what a kill cut off."""
        if not self._at_end or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return False
        return trainer.global_step != self._due_step and interrupted(trainer) is None


def _steps_an_epoch(trainer: pl.Trainer, who: str) -> float:
    """Optimizer steps of one pass over the training data."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    batches = float(trainer.num_training_batches)
    if isinstance(data, PositionedDataModule) and "samples" in data.order():
        batches = data.order()["samples"] / data.batch_size
    if not math.isfinite(batches):
        raise InputError(f"{who} cannot count epochs of data that never end; give every_n_steps")
    return batches / trainer.accumulate_grad_batches
