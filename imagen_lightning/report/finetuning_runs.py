"""What a fine-tuning took: its run folders' time and settings, adapters' sizes, what of each stage changed, origins."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imagen_lightning.errors import InputError
from imagen_lightning.finetuning.evidence_schema import Evidence
from imagen_lightning.report.differences import flatten
from imagen_lightning.report.markup import element, number
from imagen_lightning.report.page import Cell, Column, Section, bullets, details, notice, table
from imagen_lightning.report.runs import Problems, is_run, read_run

SPEED = "throughput/seconds_per_step"
# What a training costs and how it went, of all that a configuration holds.
_SETTINGS = re.compile(
    r"(model\.(cascade|stage|adapter|optimization|recompute|text\.tokens)|data\.batch_size"
    r"|trainer\.(max_steps|precision|accumulate_grad_batches|gradient_clip_val)|ema\.decay)(\.|$)"
)


def run_cost(folder: str | Path, problems: Problems) -> dict[str, Any]:
    """What a run folder tells, as plain data: {"run", "command", "created", "git", "versions", "steps",
    "seconds_per_step", "seconds", "settings": {name: value}, "files": {name: bytes}}.

    Seconds are the mean of the logged times of a step, times the steps: validation and pictures are not in them.

    Raises:
        InputError: no run folder.
    """
    path = Path(folder)
    if not path.is_dir() or not is_run(path):
        raise InputError(f"--run {str(folder)!r} is no run folder")
    run = read_run(path, problems)
    speed = run.curves.get(SPEED)
    seconds = None if speed is None else float(speed.values.mean())
    steps = run.num_steps
    settings = {name: str(value) for name, value in flatten(run.config).items() if _SETTINGS.match(name)}
    files = sorted(path.rglob("*.safetensors"))
    return {
        "run": str(folder),
        **{name: run.info.get(name) for name in ("command", "created", "git", "versions")},
        "steps": steps,
        "seconds_per_step": seconds,
        "seconds": None if seconds is None or steps is None else seconds * steps,
        "settings": settings,
        "files": {str(file.relative_to(path)): file.stat().st_size for file in files},
    }


def adapter_files(names: Sequence[str]) -> list[dict[str, Any]]:
    """The sizes of files that hold what was trained, as plain data: {"file", "bytes"}.

    Raises:
        InputError: no such file or folder.
    """
    found = []
    for name in names:
        path = Path(name)
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) if path.is_dir() else []
        if not files:
            raise InputError(f"--adapter {name!r} is no file, nor a folder with safetensors")
        found.append({"file": name, "bytes": sum(file.stat().st_size for file in files)})
    return found


def add_cost(section: Section, evidence: Evidence) -> None:
    """Adds what each stage became, and what the training took."""
    head: list[Column | str] = [
        "Stage",
        *(Column(title, numeric=True) for title in ("Parameters", "Changed", "Added", "Removed")),
    ]
    rows = [
        [
            stage["name"],
            stage["parameters"],
            Cell(_changed(stage), stage["changed"]),
            stage["added"],
            stage["removed"],
        ]
        for stage in evidence.stages
    ]
    section.add(table(head, rows, caption="Weights of AFTER beside those of BEFORE"))
    _origins(section, evidence.stages)
    runs = [run for run in evidence.runs if "run" in run]
    files = [run for run in evidence.runs if "file" in run]
    if files:
        sizes = [[Cell(element("code", item["file"])), Cell(size(item["bytes"]), item["bytes"])] for item in files]
        section.add(table(["File", Column("Size", numeric=True)], sizes, caption="What was trained, apart"))
    if not runs:
        section.add(element("p", "What the training took is not known: give its run folders as --run.", class_="hint"))
        return
    body: list[list[Any]] = [
        [
            Cell(element("code", run["run"])),
            run["steps"],
            Cell(number(_float(run["seconds_per_step"]), 3), _float(run["seconds_per_step"])),
            Cell(duration(_float(run["seconds"])), _float(run["seconds"])),
            ", ".join(f"{name} ({size(count)})" for name, count in run["files"].items()) or "–",
        ]
        for run in runs
    ]
    titles: list[Column | str] = [
        "Run",
        *(Column(title, numeric=True) for title in ("Steps", "s/step", "Time of the steps")),
        "Files",
    ]
    section.add(table(titles, body, caption="Training, without validation and pictures"))
    for run in runs:
        lines = [f"{name}: {value}" for name, value in run["settings"].items()]
        lines += [f"{name}: {run[name]}" for name in ("command", "created", "git") if run[name]]
        section.add(details(f"Settings of {run['run']}", bullets(lines)))


def _changed(stage: Mapping[str, Any]) -> str:
    share = stage["changed"] / stage["parameters"] if stage["parameters"] else 0
    return f"{stage['changed']:,} ({share:.0%})" if stage["changed"] else "none"


def _origins(section: Section, stages: Sequence[Mapping[str, Any]]) -> None:
    lines = []
    for stage in stages:
        for side in ("before", "after"):
            origin = stage["origin"][side]
            if origin:
                lines.append(f"{stage['name']}, {side}: {origin_words(origin)}")
    if lines:
        section.add(element("h3", "Origin and licence"), bullets(lines))
    else:
        section.add(notice("The cascades name no origin and no licence: their weights were trained here."))


def origin_words(origin: Mapping[str, Any]) -> str:
    """ "licence CC0; from stage base of the cascade emoji (weights 388d57f5aefb)"."""
    own = {key: value for key, value in origin.items() if key != "parents"}
    parts = [f"{key.replace('_', ' ')} {value}" for key, value in flatten(own).items()]
    for parent in origin.get("parents") or []:
        weights = ", ".join(str(sha256)[:12] for sha256 in parent.get("sha256") or [])
        text = f"from stage {parent.get('stage')} of the cascade {parent.get('cascade')} (weights {weights})"
        parts.append(f"{text}, {origin_words(parent['origin'])}" if parent.get("origin") else text)
    return "; ".join(parts)


def size(count: int) -> str:
    """ "1.4 MiB"."""
    return f"{count / 2**20:,.1f} MiB" if count >= 1 << 19 else f"{count / 1024:,.1f} KiB"


def duration(seconds: float | None) -> str:
    """ "1:02:03", "4:05"; "–" where nobody knows."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _float(value: Any) -> float | None:
    return None if value is None else float(value)
