"""One line of progress for a run that is measured in optimizer steps."""

from __future__ import annotations

import sys
from typing import Any

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

import lightning.pytorch as pl  # isort: skip
from lightning.pytorch.callbacks import ProgressBar  # isort: skip
from tqdm import tqdm

from imagen_lightning.callbacks.observer import Observer


class StepProgress(Observer, ProgressBar):
    """Steps done, loss, and the time left: a bar on a terminal, a line every `seconds` elsewhere.

    Args:
        seconds: between lines where the output is no terminal.
    """

    def __init__(self, seconds: float = 30.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._bar: tqdm[Any] | None = None
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._enabled or not trainer.is_global_zero:
            return
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=trainer.max_steps if trainer.max_steps > 0 else None,
            initial=trainer.global_step,
            desc=f"training {pl_module.__class__.__name__}",
            unit=" steps",
            mininterval=0.5 if terminal else self.seconds,
            dynamic_ncols=terminal,
            ascii=None if terminal else True,
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is None or trainer.global_step == self._bar.n:
            return
        with self.tolerating(trainer):
            self._show(self._bar, trainer)

    def _show(self, bar: tqdm[Any], trainer: pl.Trainer) -> None:
        losses = {
            name: f"{float(value):.4f}" for name, value in trainer.callback_metrics.items() if name.endswith("/loss")
        }
        bar.set_postfix(losses, refresh=False)
        bar.update(trainer.global_step - bar.n)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with self.tolerating(trainer):
            self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        with self.tolerating(trainer):
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
