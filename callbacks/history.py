"""Which samples each optimizer step saw, written outside of the checkpoints: the proof of what a run was made from."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

import lightning.pytorch as pl  # isort: skip

from imagen_lightning.callbacks.processes import of_all_processes
from imagen_lightning.io.lines import lines as read_lines
from imagen_lightning.stages import StepRecord
from imagen_lightning.types import Batch, InputError


@dataclass
class StepSamples:
    """What one optimizer step saw, over all processes and accumulated batches, in global order.

    Attributes:
        positions: the samples' numbers in the run's consumed order.
        keys: their names.
        losses: each one's loss in that step.
    """

    positions: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class SampleHistory(pl.Callback):
    """Appends to a file a line each time that training begins or goes on, and one an optimizer step.

    A step's line is written before its checkpoint. A killed run leaves lines of steps that the resumed one takes again;
    `read_history` follows that.

    Args:
        path: the file, of one JSON object a line.
    """

    def __init__(self, path: str) -> None:
        self.path = str(path)
        self._batches: list[dict[str, list[Any]]] = []  # this process's since the last optimizer step
        self._seen_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._batches, self._seen_step = [], trainer.global_step
        self._append(trainer, {"begins_after": trainer.global_step})

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(batch, Batch):
            record = getattr(pl_module, "record", None)
            losses = record.losses.tolist() if isinstance(record, StepRecord) else []
            self._batches.append({"positions": batch.positions.tolist(), "keys": list(batch.keys), "losses": losses})
        if trainer.global_step == self._seen_step:
            return  # gradients are still accumulating
        self._seen_step = trainer.global_step
        everyone, self._batches = of_all_processes(self._batches), []
        step = StepSamples()
        for parts in zip(*everyone):
            for part in parts:
                step.positions += part["positions"]
                step.keys += part["keys"]
                step.losses += part["losses"]
        self._append(trainer, {"step": trainer.global_step, **vars(step)})

    def _append(self, trainer: pl.Trainer, entry: dict[str, Any]) -> None:
        if not trainer.is_global_zero:
            return
        path = Path(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # The line before may be torn where the run was killed: a new part begins a line of its own.
        line = ("\n" if "begins_after" in entry else "") + json.dumps(entry) + "\n"
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def read_history(path: str | Path) -> list[StepSamples]:
    """The steps behind a run's weights, first to last: those that a restart went back over count as it took them again.

    Raises:
        InputError: a part goes on after a step that no earlier part reached, or steps are missing.
    """
    steps: list[StepSamples] = []
    for line in read_lines(Path(path).read_text(encoding="utf-8")):
        try:
            entry = json.loads(line or "{}")
        except json.JSONDecodeError:
            continue  # torn by a kill: the part that follows takes the step again
        if "begins_after" in entry:
            if entry["begins_after"] > len(steps):
                raise InputError(f"{path}: a part begins after step {entry['begins_after']} of {len(steps)}")
            del steps[entry["begins_after"] :]
        elif entry:
            if entry.pop("step") != len(steps) + 1:
                raise InputError(f"{path}: step {len(steps) + 1} is missing")
            steps.append(StepSamples(**entry))
    return steps
