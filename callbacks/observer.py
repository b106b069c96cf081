"""Callbacks that only look at a training: what goes wrong inside them is told, and the training continues."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

import lightning.pytorch as pl  # isort: skip

from imagen_lightning.callbacks.processes import of_all_processes
from imagen_lightning.callbacks.run_folder import run_dir

log = logging.getLogger(__name__)

FAILURES = "failures.jsonl"
T = TypeVar("T")


class Observer(pl.Callback):
    """A callback without which training would be the same: it measures, generates samples, or logs.

    An exception inside `tolerating` ends nothing. The first one of each kind is logged as a warning and, by the first
    process, added to RUN/failures.jsonl: {"step", "callback", "error"} a line. Signals and Ctrl-C are not caught, nor
    is what is refused before the first step.

    Attributes:
        strict: let the exception end the training instead.
    """

    strict = False
    _told: frozenset[str] = frozenset()

    @contextmanager
    def tolerating(self, trainer: pl.Trainer) -> Iterator[None]:
        """What fails inside is told and left out."""
        try:
            yield
        except Exception as error:
            if self.strict:
                raise
            self._tell(trainer, error)

    def _tell(self, trainer: pl.Trainer, error: Exception) -> None:
        kind, name = type(error).__name__, type(self).__name__
        if kind in self._told:
            return
        self._told |= {kind}
        step, words = trainer.global_step, f"{kind}: {error}".strip()
        log.warning(
            "%s failed at step %d and is left out there; training continues (strict: true would end it): %s",
            *(name, step, words),
        )
        log.debug("%s failed:", name, exc_info=error)
        if not trainer.is_global_zero:
            return
        try:
            with (run_dir(trainer) / FAILURES).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "callback": name, "error": words}) + "\n")
        except OSError as failed:
            log.warning("%s cannot be written: %s", run_dir(trainer) / FAILURES, failed.strerror)


def together(work: Callable[[], T]) -> T:
    """Return what `work` gives, or raise in every process where it failed in one; every process must call.

    `work` itself may not wait for other processes. What follows may: none is left waiting for one that failed.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as raised:  # noqa: BLE001 (raised again below, when the other processes know)
        error = raised
    told = of_all_processes(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, words in enumerate(told):
        if words is not None:
            raise RuntimeError(f"process {rank}: {words}")
    return result  # type: ignore[return-value]
