"""Run folders as a page reads them: CSV, JSON and YAML as plain data; what is broken is noted and left out."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from imagen_lightning.catalog import is_of_weights
from imagen_lightning.io.lines import is_step
from imagen_lightning.io.lines import lines as read_lines
from imagen_lightning.io.yaml import read_yaml
from imagen_lightning.metrics.protocol import Value
from imagen_lightning.report.sample_sets import SampleSet, read_steps

CONFIG, INFO, METRICS, SKIPPED = "config.yaml", "run.json", "metrics.csv", "skipped.jsonl"
FAILURES = "failures.jsonl"
VALUES, VERDICT = "values.jsonl", "verdict.json"
_T = TypeVar("_T")


class Problems:
    """What could not be used, in words that name the file."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, path: Path, text: str) -> None:
        line = f"{path}: {text}"
        if line not in self.lines:
            self.lines.append(line)


@dataclass(frozen=True)
class Curve:
    """A metric over training: (N,) increasing steps and their float64 values, N at least 1."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float:
        return float(self.values[-1])


@dataclass(frozen=True)
class Measurement:
    """A metric with its protocol at a step of training; `name` is its column in metrics.csv."""

    step: int
    name: str
    value: Value


@dataclass
class Run:
    """One stage's training.

    Attributes:
        folder: the run folder.
        name: for people; unique on a page.
        config: config.yaml, {} where it is missing.
        info: run.json, {} where it is missing.
        curves: by metric, as metrics.csv names it.
        measurements: of values.jsonl, by rising step.
        verdict: what the probes said last, one sentence an ailment; None where they were not asked.
        samples: by rising step.
        num_skipped: training samples that could not be used, None where none was listed.
    """

    folder: Path
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    verdict: list[str] | None = None
    samples: list[SampleSet] = field(default_factory=list)
    num_skipped: int | None = None

    @property
    def num_steps(self) -> int | None:
        """Optimizer steps behind the last number that was logged; None where none was."""
        ends = [int(curve.steps[-1]) + (not is_of_weights(name)) for name, curve in self.curves.items()]
        return max([*ends, *(item.step for item in self.measurements)], default=None)

    @property
    def is_empty(self) -> bool:
        return not (self.config or self.info or self.curves or self.measurements or self.samples)


def is_run(folder: Path) -> bool:
    """Whether a folder looks like a run's."""
    return any((folder / name).is_file() for name in (METRICS, CONFIG, INFO))


def read_run(folder: Path, problems: Problems) -> Run:
    """Reads what is whole in a run folder and notes the rest."""
    config = _read(folder / CONFIG, _configuration, problems)
    info = _read(folder / INFO, _mapping_of(json.loads), problems)
    if not (folder / METRICS).exists():
        problems.add(folder, f"no {METRICS}: nothing was logged yet")
    curves = _read(folder / METRICS, lambda text: _curves(text, folder / METRICS, problems), problems) or {}
    for words in _read(folder / FAILURES, _failures, problems) or []:
        problems.add(folder, words)
    counts = [curve.last for name, curve in curves.items() if name.startswith("data/skipped/")]
    skipped = sum(int(count) for count in counts if math.isfinite(count))
    return Run(
        folder,
        config=config or {},
        info=info or {},
        curves=curves,
        measurements=_read(folder / VALUES, lambda text: _measurements(text, folder / VALUES, problems), problems)
        or [],
        verdict=_read(folder / VERDICT, _verdict, problems),
        samples=read_steps(folder / "samples", problems.add),
        num_skipped=skipped or _read(folder / SKIPPED, lambda text: text.count("\n") or None, problems),
    )


def _read(path: Path, parse: Callable[[str], _T], problems: Problems) -> _T | None:
    """A file's content, None where there is no file or where it is broken, which is noted."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.add(path, f"cannot be read: {error.strerror}")
    except (ValueError, RecursionError):
        problems.add(path, "is broken or half-written, and left out")
    return None


def _mapping_of(parse: Callable[[str], Any]) -> Callable[[str], dict[str, Any]]:
    def parse_mapping(text: str) -> dict[str, Any]:
        content = parse(text)
        if not isinstance(content, Mapping):
            raise ValueError("no mapping")
        return dict(content)

    return parse_mapping


def _configuration(text: str) -> dict[str, Any]:
    return _mapping_of(lambda content: read_yaml(content, CONFIG))(text)


def _verdict(text: str) -> list[str]:
    content = _mapping_of(json.loads)(text)
    sentences, step = content.get("verdict"), content.get("step")
    if not isinstance(sentences, list):
        raise ValueError("no verdict")
    return [f"{sentence} (step {step})" for sentence in sentences or ["nothing ails"]]


def _failures(text: str) -> list[str]:
    """What callbacks could not measure, in words."""
    lines = [_mapping_of(json.loads)(line) for line in read_lines(text)]
    return [
        f"{line.get('callback')} failed at step {line.get('step')} and logged nothing there: {line.get('error')}"
        for line in lines
    ]


def _measurements(text: str, path: Path, problems: Problems) -> list[Measurement]:
    """One a line; those that cannot be read are counted and left out."""
    lines = read_lines(text)
    found = [item for line in lines if (item := _measurement(line)) is not None]
    if len(found) < len(lines):
        problems.add(path, f"lines that are no values are left out: {len(lines) - len(found)}")
    return sorted(found, key=lambda item: item.step)


def _measurement(line: str) -> Measurement | None:
    try:
        content = json.loads(line)
        return Measurement(int(content["step"]), str(content["name"]), read_value(content["value"]))
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def read_value(content: Any) -> Value:
    """A value from its JSON.

    Raises:
        TypeError, ValueError: it is none.
    """
    value = Value.from_json(content)
    if not isinstance(value.metric, str) or not isinstance(value.confidence, str | None):
        raise ValueError(f"metric {value.metric!r} and confidence {value.confidence!r} must be texts")
    return value


def _curves(text: str, path: Path, problems: Problems) -> dict[str, Curve]:
    """The columns of a table of steps; rows and cells that are no numbers are counted and left out."""
    lines = csv.reader(read_lines(text))
    header = next(lines, [])
    if "step" not in header:
        raise ValueError("no column of steps")
    place, bad = header.index("step"), 0
    rows: dict[int, list[str]] = {}
    for cells in lines:
        if len(cells) == len(header) and is_step(cells[place]):
            rows[int(cells[place])] = cells
        else:
            bad += 1
    steps: dict[str, list[int]] = {name: [] for name in header if name != "step"}
    values: dict[str, list[float]] = {name: [] for name in steps}
    for step in sorted(rows):
        for name, cell in zip(header, rows[step]):
            if not cell or name == "step":
                continue
            try:
                values[name].append(float(cell))
            except ValueError:
                bad += 1
                continue
            steps[name].append(step)
    if bad:
        problems.add(path, f"rows or cells that are no numbers are left out: {bad}")
    return {name: Curve(np.array(steps[name]), np.array(values[name])) for name in steps if steps[name]}
