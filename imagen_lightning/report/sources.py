"""What a report is made of: the runs, evaluations and samples at or below the folders that were given."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from imagen_lightning.errors import InputError
from imagen_lightning.evaluation.schema import EVALUATION, Evaluation, load
from imagen_lightning.report.runs import Problems, Run, is_run, read_run
from imagen_lightning.report.sample_sets import SAMPLES, SampleSet, read_drawn
from imagen_lightning.report.studies import FoundSweep, is_sweep, read_sweep

BEST_TRIALS = 8  # of a sweep, whose runs the page shows in full
_DEPTH = 4  # folders below a given one that are looked into
_NEVER = ("checkpoints", "wandb", "__pycache__")


@dataclass(frozen=True)
class Found:
    """An evaluation or a folder of samples, with its name for people."""

    folder: Path
    name: str


@dataclass(frozen=True)
class FoundEvaluation(Found):
    evaluation: Evaluation


@dataclass(frozen=True)
class FoundSamples(Found):
    samples: SampleSet


@dataclass
class Sources:
    """What there is to show.

    Attributes:
        title: the name of the folder that holds all of it.
        runs: trainings of stages.
        evaluations: of cascades.
        samples: of `imagen-lightning sample`.
        sweeps: studies, of which the runs and evaluations are the best trials' alone.
        problems: what is broken or half-written, and left out.
    """

    title: str
    runs: list[Run] = field(default_factory=list)
    evaluations: list[FoundEvaluation] = field(default_factory=list)
    samples: list[FoundSamples] = field(default_factory=list)
    sweeps: list[FoundSweep] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)


def read_sources(paths: Sequence[str | Path]) -> Sources:
    """Reads all that lies in the given folders: run folders, evaluations, samples, and folders of these.

    Raises:
        InputError: nothing usable is there.
    """
    problems = Problems()
    folders = list(dict.fromkeys(folder for path in paths for folder in _discover(Path(path), problems)))
    sweeps = [found for folder in folders if is_sweep(folder) and (found := read_sweep(folder, problems)) is not None]
    kept = [folder for folder in folders if not is_sweep(folder)]
    best = [trial.folder for sweep in sweeps for trial in sweep.finished[:BEST_TRIALS] if trial.folder.exists()]
    folders = list(dict.fromkeys([*kept, *map(Path, map(os.path.abspath, best))]))
    title, names = _names(folders)
    sources = Sources(sweeps[0].name if sweeps and not kept else title, problems=problems)
    sources.sweeps = _once(sweeps)
    for folder, name in zip(folders, names):
        if (folder / EVALUATION).is_file():
            try:
                sources.evaluations.append(FoundEvaluation(folder, name, load(folder)))
            except InputError as error:
                problems.lines.append(f"{error} (left out)")
        if is_run(folder):
            run = read_run(folder, problems)
            run.name = name
            if not run.is_empty:
                sources.runs.append(run)
        elif (folder / SAMPLES).is_file():
            drawn = read_drawn(folder, problems.add)
            if drawn is not None:
                sources.samples.append(FoundSamples(folder, name, drawn))
    if not (sources.runs or sources.evaluations or sources.samples or sources.sweeps):
        raise InputError(
            f"nothing to report on: {'; '.join(problems.lines) or 'no folder was given'}; "
            "give run folders, evaluations, or a folder that holds some"
        )
    return sources


def _discover(path: Path, problems: Problems) -> Iterable[Path]:
    """The run, evaluation and sample folders at or below a path, in order of their names."""
    if not path.exists():
        problems.add(path, "does not exist")
        return []
    if not path.is_dir():
        problems.add(path, "is a file; give the folder that holds it")
        return []
    top = Path(os.path.abspath(path))
    found = []
    for folder, below, files in os.walk(top):
        place = Path(folder)
        if EVALUATION in files or SAMPLES in files or is_run(place) or is_sweep(place):
            found.append(place)
            below.clear()
            continue
        deep = len(place.relative_to(top).parts) >= _DEPTH
        below[:] = [] if deep else sorted(name for name in below if name not in _NEVER and not name.startswith("."))
    if not found:
        problems.add(path, "holds no run, evaluation or samples")
    return found


def _once(sweeps: Sequence[FoundSweep]) -> list[FoundSweep]:
    """One of the folders that share a study."""
    found: dict[tuple[object, ...], FoundSweep] = {}
    for sweep in sweeps:
        found.setdefault((sweep.name, sweep.study), sweep)
    return list(found.values())


def _names(folders: Sequence[Path]) -> tuple[str, list[str]]:
    """The name of the folder that holds all, and each one's path below it."""
    if not folders:
        return "", []
    common = Path(os.path.commonpath(folders))
    if len(folders) == 1:
        return common.name, [common.name]
    return common.name or "runs", [str(folder.relative_to(common)) for folder in folders]
