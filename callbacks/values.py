"""Numbers with their protocols while a stage trains: to the loggers, and whole to RUN/values.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

import lightning.pytorch as pl  # isort: skip

from imagen_lightning.callbacks.run_folder import log_metrics, run_dir
from imagen_lightning.files import write_text
from imagen_lightning.metrics.protocol import Value
from imagen_lightning.stages import DiffusionMixin

VALUES = "values.jsonl"


def stage_name(stage: DiffusionMixin) -> str:
    """ "base", or "sr_256" for super-resolution to 256 px, as in a cascade."""
    return "base" if getattr(stage, "low_res_size", None) is None else f"sr_{stage.image_size}"


def column(stage: DiffusionMixin, metric: str) -> str:
    """The loggers' name of a metric: "base/clip_score"."""
    return f"{stage_name(stage)}/{metric.lower().replace(' ', '_').replace(',', '')}"


def log_values(trainer: pl.Trainer, stage: DiffusionMixin, values: Sequence[Value]) -> None:
    """Sends values to the loggers under `stage/metric`, and in the first process adds them to RUN/values.jsonl."""
    log_metrics(trainer, {column(stage, value.metric): value.value for value in values})
    if not trainer.is_global_zero:
        return
    path = run_dir(trainer) / VALUES
    lines = [
        json.dumps({"step": trainer.global_step, "name": column(stage, value.metric), "value": value.to_json()})
        for value in values
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))


def rewind_values(path: Path, step: int) -> None:
    """Drops the values behind `step`, which a run that goes on from there measures again, and a torn last line."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _step(line) <= step]
    if len(kept) < len(lines):
        write_text(path, "".join(f"{line}\n" for line in kept))


def _step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")
