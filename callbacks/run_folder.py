"""The run folder: where a run's files lie, and what `run.json` says about it.

A run folder is the trainer's `default_root_dir`: `RUN/{config.yaml, run.json, metrics.csv, checkpoints/, samples/STEP/,
non_finite/, wandb/}`.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

import lightning.pytorch as pl  # isort: skip
from imagen_lightning.files import write_json
from imagen_lightning.provenance import git_revision, versions
from imagen_lightning.types import InputError

RUN_INFO = "run.json"


def run_dir(trainer: pl.Trainer) -> Path:
    """The folder of the trainer's run."""
    return Path(trainer.default_root_dir)


def log_metrics(trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
    """Sends metrics to the loggers at the step at which Lightning logs now, so that they share a row with its own."""
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=step)


def log_evaluation(trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
    """Sends what was measured of the weights as they are to the loggers, at the number of steps behind them."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step)


def read_run_info(run_dir: str | Path) -> dict[str, Any]:
    """What RUN/run.json holds; {} where there is none.

    Raises:
        InputError: the file is no JSON object.
    """
    path = Path(run_dir) / RUN_INFO
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        info = None
    if not isinstance(info, dict):
        raise InputError(f"{path} is not readable as a run's information; delete it to begin a new one")
    return info


def update_run_info(run_dir: str | Path, **items: Any) -> dict[str, Any]:
    """Sets entries of RUN/run.json and returns all of them.

    A new file begins with `created` (UTC), `versions`, `git` (the working folder's revision, null outside of a
    repository) and `command`.
    """
    info = {**(read_run_info(run_dir) or _origin()), **items}
    write_json(Path(run_dir) / RUN_INFO, info)
    return info


def _origin() -> dict[str, Any]:
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "git": git_revision(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
