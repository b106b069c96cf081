"""A sweep's study as a page reads it: trials as plain data, and which parameters mattered."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagen_lightning.errors import InputError
from imagen_lightning.report.runs import Problems

if TYPE_CHECKING:
    from optuna.study import Study

INFO = "sweep.json"
LEAST_FOR_IMPORTANCE = 4


@dataclass(frozen=True)
class Tried:
    """One trial.

    Attributes:
        number: in the study.
        state: "finished", "pruned", "failed" or "not finished".
        value: the metric's last one, None where there is none.
        values: every parameter's, by name.
        folder: its run folder.
        seconds: that its processes took, over all starts.
        problem: what went wrong, None where nothing did.
    """

    number: int
    state: str
    value: float | None
    values: Mapping[str, Any]
    folder: Path
    seconds: float | None
    problem: str | None


@dataclass(frozen=True)
class FoundSweep:
    """A sweep's study.

    Attributes:
        folder: of the sweep.
        name: for people.
        metric: its name.
        maximize: whether more is better.
        study: the storage's address.
        trials: by number.
        importance: of parameters, sums to 1; {} where too little is known.
        scales: "log" or "linear" by the parameters that were searched so; no entry for listed values.
    """

    folder: Path
    name: str
    metric: str
    maximize: bool
    study: str
    trials: Sequence[Tried]
    importance: Mapping[str, float]
    scales: Mapping[str, str] = field(default_factory=dict)

    @property
    def finished(self) -> list[Tried]:
        """Finished trials, the best first."""
        found = [(trial, trial.value) for trial in self.trials if trial.state == "finished" and trial.value is not None]
        sign = -1 if self.maximize else 1
        return [trial for trial, _ in sorted(found, key=lambda pair: (sign * pair[1], pair[0].number))]

    @property
    def names(self) -> list[str]:
        """Parameters that differ between trials."""
        every = dict.fromkeys(name for trial in self.trials for name in trial.values)
        return [
            name
            for name in every
            if len({json.dumps(trial.values.get(name), sort_keys=True) for trial in self.trials}) > 1
        ]


def is_sweep(folder: Path) -> bool:
    """Whether a folder is a sweep's."""
    return (folder / INFO).is_file()


def read_sweep(folder: Path, problems: Problems) -> FoundSweep | None:
    """A sweep from its study; None where that cannot be read, which is noted."""
    import optuna

    from imagen_lightning.sweeps.folder import STUDY, read_info
    from imagen_lightning.sweeps.search import storage_of

    try:
        info = read_info(folder) or {}
        address = str(info["study"])
        if address.endswith(f"/{STUDY}") and (folder / STUDY).exists():
            address = f"sqlite:///{(folder / STUDY).absolute()}"  # of a folder that was moved
        if "://" not in address and not Path(address).exists():
            raise InputError(f"there is no journal {address}")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.load_study(study_name=str(info["name"]), storage=storage_of(address))
    except (InputError, KeyError) as error:
        problems.add(folder / INFO, f"its study cannot be read: {error}")
        return None
    trials = [
        _tried(trial, folder) for trial in study.get_trials(deepcopy=False) if not trial.user_attrs.get("surplus")
    ]
    metric = str(info.get("metric") or (study.metric_names or ["metric"])[0])
    maximize = study.direction == optuna.study.StudyDirection.MAXIMIZE
    scales = {
        name: "log" if getattr(distribution, "log", False) else "linear"
        for trial in study.get_trials(deepcopy=False)
        for name, distribution in trial.distributions.items()
        if not isinstance(distribution, optuna.distributions.CategoricalDistribution)
    }
    return FoundSweep(folder, str(info["name"]), metric, maximize, address, trials, _importance(study), scales)


def _tried(trial: Any, folder: Path) -> Tried:
    states = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
    state = states.get(trial.state.name, "not finished")
    value = trial.value if state == "finished" else None
    if value is None and trial.intermediate_values:
        value = trial.intermediate_values[max(trial.intermediate_values)]
    place = folder / "trials" / f"{trial.number:04d}"
    return Tried(
        trial.number,
        state,
        value if value is not None and math.isfinite(value) else None,
        trial.user_attrs.get("values", trial.params),
        place if place.exists() else Path(trial.user_attrs.get("folder", place)),
        trial.user_attrs.get("seconds"),
        trial.user_attrs.get("problem"),
    )


def _importance(study: Study) -> dict[str, float]:
    """Shares of the metric's variance among the finished trials (PED-ANOVA, Watanabe et al. 2023)."""
    import optuna

    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    differing = {name for trial in complete for name in trial.params} and {
        name for name in complete[0].params if len({repr(trial.params.get(name)) for trial in complete}) > 1
    }
    if len(complete) < LEAST_FOR_IMPORTANCE or not differing or len({trial.value for trial in complete}) < 2:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator, params=sorted(differing)))
