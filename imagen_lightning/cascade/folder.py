"""A cascade's folder, the manifest and the weights: written whole or not at all, read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from imagen_lightning import __version__
from imagen_lightning.cascade.description import (
    as_module,
    build_stage,
    contradictions,
    num_parameters,
    share_encoders,
    stage_name,
    stage_summary,
)
from imagen_lightning.cascade.local import first_line, whole_folder
from imagen_lightning.cascade.manifest import FORMAT, MANIFEST, RESIZE, VALUE_RANGE, VERSION, read_manifest
from imagen_lightning.cascade.origin import check_origin, check_record
from imagen_lightning.cascade.weights import load_stage_weights, stored_shapes, write_stage_weights
from imagen_lightning.components import class_path
from imagen_lightning.io.atomic import write_text
from imagen_lightning.stages import DiffusionMixin
from imagen_lightning.types import InputError


def write_folder(
    folder: str | Path, stages: Sequence[DiffusionMixin], metrics: list[dict[str, Any]], max_shard_size: int
) -> None:
    """Writes the manifest and the weights to a new or empty folder, whole or not at all."""
    if max_shard_size < 1:
        raise InputError(f"max_shard_size {max_shard_size} must be at least one byte")
    entries = [{**stage_entry(stage), "weights": {}} for stage in stages]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "created_with": {"imagen_lightning": __version__, "torch": torch.__version__},
        "value_range": VALUE_RANGE,
        "resize": RESIZE,
        "stages": entries,
        "metrics": metrics,
    }
    with whole_folder(folder) as partial:
        for entry, stage in zip(entries, stages):
            files = write_stage_weights(as_module(stage), partial, stage_name(stage), max_shard_size)
            # One file is written as it was before there could be several.
            record = {} if stage.weights_record is None else {"record": stage.weights_record}
            entry["weights"] = {"num_parameters": num_parameters(stage), **record} | (
                files[0] if len(files) == 1 else {"files": files}
            )
        (partial / MANIFEST).write_text(_json(manifest), encoding="utf-8")


def read_folder(
    folder: str | Path, trust: tuple[str, ...], dtype: str | None = None, device: torch.device | str = "cpu"
) -> tuple[list[DiffusionMixin], list[dict[str, Any]]]:
    """The stages and the metrics of a cascade's folder."""
    path, manifest = read_manifest(folder)
    stages = [read_stage(path, entry, trust, dtype, device) for entry in manifest["stages"]]
    return share_encoders(stages), manifest["metrics"]


def read_stage(
    path: Path,
    entry: Mapping[str, Any],
    trust: tuple[str, ...],
    dtype: str | None = None,
    device: torch.device | str = "cpu",
) -> DiffusionMixin:
    """One stage of the cascade whose manifest lies at `path`, from its part of that."""
    what = f"stage {entry['name']!r} of {path}"
    origin = check_origin(entry.get("origin"), what)
    record = check_record(entry["weights"].get("record"), what)
    stage = build_stage(entry["stage"], trust, what, stored_shapes(path.parent, entry, what))
    _refuse_contradictions(entry, stage_summary(stage), what)
    load_stage_weights(as_module(stage), path.parent, entry, what, dtype, device)
    _refuse_contradictions(entry, {"weights": {"num_parameters": num_parameters(stage)}}, what)
    stage.origin, stage.weights_record = origin, record
    return stage


def _refuse_contradictions(entry: Mapping[str, Any], found: Mapping[str, Any], what: str) -> None:
    for key, problem in contradictions(entry, found):
        raise InputError(f"{what}: {key} {problem}")


def rewrite_manifest(folder: str | Path, stages: Sequence[DiffusionMixin], metrics: list[dict[str, Any]]) -> None:
    """Write the manifest of a cascade's folder anew for the same stages; the weights stay as they are."""
    path, manifest = read_manifest(folder)
    names = [stage_name(stage) for stage in stages]
    if [entry["name"] for entry in manifest["stages"]] != names:
        raise InputError(f"{path} has stages other than {', '.join(names)}; give this cascade's own folder")
    for entry, stage in zip(manifest["stages"], stages):
        entry.update(stage_entry(stage))
    manifest["metrics"] = metrics
    try:
        write_text(path, _json(manifest))
    except OSError as error:
        raise InputError(f"{path} cannot be written: {first_line(error)}") from error


def stage_entry(stage: DiffusionMixin) -> dict[str, Any]:
    """What the manifest holds of a stage, but for its weights."""
    return {
        **stage_summary(stage),
        "stage": {"class_path": class_path(stage), "init_args": stage.hyperparameters()},
        "origin": check_origin(stage.origin, f"stage {stage_name(stage)!r}"),
    }


def _json(manifest: Any) -> str:
    return json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
