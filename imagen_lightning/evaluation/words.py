"""An evaluation for a terminal: its table, the best of a sweep's points, and settings in words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from imagen_lightning.cascade import StageSettings
from imagen_lightning.catalog import is_percent
from imagen_lightning.errors import counted
from imagen_lightning.evaluation.measures import Judge, Measured
from imagen_lightning.evaluation.points import best_point, pareto
from imagen_lightning.evaluation.schema import Evaluation, Row
from imagen_lightning.metrics.alike import is_alike

_SETTINGS = ("guidance", "steps", "aug_level", "sampler")
_ELSEWHERE = ("precision", "recall", "Inception score")  # on the page and in the file: a line holds no more


def table(evaluation: Evaluation) -> str:
    """The rows with their values and intervals."""
    metrics = [value["metric"] for row in evaluation.rows for value in row.values]
    names = [name for name in dict.fromkeys(metrics) if "," not in name and name not in _ELSEWHERE]
    varied = _varied(evaluation)
    lines = [["stage", "input", *varied, *names, "s/image"]]
    for row in evaluation.rows:
        found = {value["metric"]: value for value in row.values}
        lines.append(
            [
                row.stage,
                row.input or "-",
                *(_short(row.settings.get(name)) for name in varied),
                *(cell(found.get(name)) for name in names),
                "-" if row.seconds_per_image is None else f"{row.seconds_per_image:.3f}",
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in lines)


def cell(value: Mapping[str, Any] | None) -> str:
    """A value with its interval, "0.0123 (0.01 to 0.015)"; shares in percent."""
    if value is None:
        return "-"
    scale, unit = (100, "%") if is_percent(value["metric"]) else (1, "")
    number, low, high = (
        "" if value.get(name) is None else f"{scale * float(value[name]):.3g}{unit}"
        for name in ("value", "low", "high")
    )
    return f"{number} ({low} to {high})" if low else number


def settings_of(row: Row, names: Sequence[str] = _SETTINGS) -> str:
    """ "guidance 1.5,1, steps 30,15, …", of a cascade one for each stage."""
    return ", ".join(f"{name.replace('_', ' ')} {_short(row.settings.get(name))}" for name in names)


def sweep_verdict(
    rows: Sequence[Row],
    settings: Sequence[Sequence[StageSettings]],
    measured: Sequence[Measured],
    judges: Sequence[Judge],
) -> str:
    """The best point by the first judge, and of the quicker ones those that no other beats in quality and time."""
    if not judges:
        return "nothing was measured: these prompts have no real images; give --clip for the CLIP score"
    judge = judges[0]
    quality = [judge.quality(item) for item in measured]
    best = best_point(quality, settings)
    value = measured[best].value(judge.metric)
    if len(rows) == 1:
        return f"{judge.metric}: {cell(value.to_json())} at {settings_of(rows[0])}"
    names = [name for name in _SETTINGS if len({json.dumps(row.settings.get(name)) for row in rows}) > 1]
    parts = [f"best {judge.metric}: {cell(value.to_json())} at {settings_of(rows[best], names)}"]
    others = [item.value(judge.metric) for place, item in enumerate(measured) if place != best]
    if value.low is None or any(other.low is None for other in others):
        parts.append("without intervals it cannot be told from the others")
    elif equal := sum(is_alike(value, other) for other in others):
        parts.append(
            f"{counted(equal, 'other point')} of {len(others)} cannot be told from it: more samples would tell"
        )
    else:
        parts.append("every other point is worse by more than chance")
    seconds = {place: row.seconds_per_image for place, row in enumerate(rows) if row.seconds_per_image is not None}
    places = list(seconds)
    front = [places[k] for k in pareto([quality[place] for place in places], list(seconds.values()))]
    quicker = [place for place in front if place != best and seconds[place] < seconds.get(best, 0)]
    if quicker:
        parts.append(
            "quicker, and the best at their time: "
            + " / ".join(
                f"{settings_of(rows[place], names)} ({cell(measured[place].value(judge.metric).to_json())}, "
                f"{seconds[place]:.3g} s/image)"
                for place in sorted(quicker, key=seconds.__getitem__)
            )
        )
    return "; ".join(parts)


def _varied(evaluation: Evaluation) -> list[str]:
    """In a sweep, the settings in which its rows differ."""
    if evaluation.kind == "matrix":
        return []
    names = ("category", "guidance", "steps", "sampler", "aug_level")
    return [name for name in names if len({json.dumps(row.settings.get(name)) for row in evaluation.rows}) > 1]


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join("-" if item is None else f"{item}" for item in value)
    return "-" if value is None else f"{value}"
