"""Numbers with their protocols while a stage trains: to the loggers, and whole to RUN/values.jsonl.

RUN/values.jsonl holds one JSON object a line: {"step": optimizer steps behind the weights, "name": "base/fid",
"value": the JSON of a `imagen_lightning.metrics.protocol.Value`}, in the order in which they were measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

import lightning.pytorch as pl  # isort: skip

from imagen_lightning.callbacks.run_folder import log_evaluation, run_dir
from imagen_lightning.catalog import slug
from imagen_lightning.files import write_text
from imagen_lightning.io.lines import lines as read_lines
from imagen_lightning.metrics.protocol import Value
from imagen_lightning.stages import DiffusionMixin
from imagen_lightning.types import InputError

VALUES = "values.jsonl"


def stage_name(stage: DiffusionMixin) -> str:
    """ "base", or "sr_256" for super-resolution to 256 px, as in a cascade."""
    return stage_name_of(getattr(stage, "low_res_size", None), stage.image_size)


def stage_name_of(low_res_size: int | None, image_size: int) -> str:
    """Return the name of a stage of these sizes; a base stage has no low-resolution input."""
    return "base" if low_res_size is None else f"sr_{image_size}"


def column(stage: DiffusionMixin, metric: str) -> str:
    """The loggers' name of a metric: "base/clip_score"."""
    return column_of(stage_name(stage), metric)


def column_of(stage: str, metric: str) -> str:
    """Return the loggers' name of a metric of the stage of that name."""
    return f"{stage}/{slug(metric)}"


def log_values(trainer: pl.Trainer, named: Mapping[str, Value]) -> None:
    """Sends values by name to the loggers, and in the first process adds them to RUN/values.jsonl."""
    log_evaluation(trainer, {name: value.value for name, value in named.items()})
    if trainer.is_global_zero:
        step = trainer.global_step
        entries = [{"step": step, "name": name, "value": value.to_json()} for name, value in named.items()]
        new = _places(entries)
        _keep(run_dir(trainer) / VALUES, lambda entry: (entry["step"], entry["name"]) not in new, entries)


def rewind_values(trainer: pl.Trainer) -> None:
    """Drops the values of later steps than the trainer's, which a run that goes on from there measures again."""
    path = run_dir(trainer) / VALUES
    if trainer.is_global_zero and path.exists():
        _keep(path, lambda entry: entry["step"] <= trainer.global_step, [])


def _places(entries: Sequence[dict[str, Any]]) -> set[tuple[int, str]]:
    return {(entry["step"], entry["name"]) for entry in entries}


def _keep(path: Path, wanted: Callable[[dict[str, Any]], bool], more: Sequence[dict[str, Any]]) -> None:
    """Rewrites the file with the entries that are wanted, and more.

    Raises:
        InputError: it is none of ours.
    """
    lines = read_lines(path.read_text(encoding="utf-8")) if path.exists() else []
    try:
        kept = [line for line in lines if wanted(json.loads(line))]
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{path} holds no values; move it out of the run folder") from None
    write_text(path, "".join(f"{line}\n" for line in [*kept, *map(json.dumps, more)]))
