"""The run folder: where a run's files lie, what `run.json` says about it, and files written whole.

A run folder is the trainer's `default_root_dir`: `RUN/{config.yaml, run.json, metrics.csv, checkpoints/, samples/STEP/,
non_finite/, wandb/}`.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

import lightning.pytorch as pl  # isort: skip
from imagen_lightning import __version__
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


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file whole or not at all; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", newline="")
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON whole or not at all; numbers that JSON lacks become "nan", "inf" and "-inf"."""
    write_text(path, json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


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
    versions = {package: version(package) for package in ("torch", "lightning")}
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"imagen-lightning": __version__, **versions, "python": sys.version.split()[0]},
        "git": _git_revision(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _git_revision() -> str | None:
    """The commit of the working folder, followed by "-dirty" where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
