"""A trial's metric, from what its program left in its folder.

A training's metrics.csv gives the metric's values in the order that they were logged, and its last one is the trial's
value, as W&B's summary has it. An evaluation's evaluation.json gives one value: the whole cascade's.
"""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

from imagen_lightning.io.lines import is_step

METRICS, EVALUATION = "metrics.csv", "evaluation.json"


def history(folder: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of the metric, by rising step; nothing where nothing was logged yet."""
    evaluated = folder / EVALUATION
    if evaluated.is_file():
        value = evaluation_values(folder).get(metric)
        return [] if value is None else [(0, value)]
    found: dict[int, float] = {}
    try:
        with (folder / METRICS).open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                cell, step = row.get(metric), row.get("step")
                if cell and step and is_step(step) and (value := _number(cell)) is not None:
                    found[int(step)] = value
    except (FileNotFoundError, csv.Error, UnicodeDecodeError):
        return []
    return sorted(found.items())


def stamp(folder: Path) -> tuple[int, int] | None:
    """What changes when a folder's metrics.csv is written again; None where there is none."""
    try:
        found = (folder / METRICS).stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size


def last_written(folder: Path) -> float:
    """Return when a trial last wrote its metrics or evaluation, in seconds of the epoch; 0 where it wrote nothing."""
    paths = (folder / METRICS, folder / EVALUATION)
    return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)


def known_metrics(folder: Path) -> list[str]:
    """The names that a folder holds, for a message about one that it does not."""
    if (folder / EVALUATION).is_file():
        return sorted(evaluation_values(folder))
    try:
        with (folder / METRICS).open(encoding="utf-8", newline="") as file:
            return [name for name in next(csv.reader(file), []) if name != "step"]
    except (FileNotFoundError, csv.Error, UnicodeDecodeError):
        return []


def evaluation_values(folder: Path) -> dict[str, float]:
    """The whole cascade's numbers, and its seconds_per_image; {} where the file is no evaluation."""
    try:
        rows = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))["rows"]
        whole = [row for row in rows if row["input"] == "chain"] or [row for row in rows if row["input"] is None]
        row = whole[0]
        values = {item["metric"]: _number(item["value"]) for item in row["values"]}
        values["seconds_per_image"] = _number(row.get("seconds_per_image"))
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return {}
    return {name: value for name, value in values.items() if value is not None}


def _number(cell: Any) -> float | None:
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None
