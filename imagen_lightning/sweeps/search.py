"""A sweep file's search by Optuna: the study, its samplers, and W&B's hyperband as a pruner.

What a trial tries depends on the file, the sweep's seed and the trial's number alone (and for bayes on what was
found before), so that a sweep that is stopped goes on as if it had not been, and machines that share a study never try
the same draw: a study gives each number once.
"""

from __future__ import annotations

import json
import math
import time
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from imagen_lightning.errors import InputError
from imagen_lightning.sweeps.distributions import (
    Categorical,
    Constant,
    Distribution,
    IntUniform,
    LogUniform,
    Normal,
    QUniform,
    Uniform,
)
from imagen_lightning.sweeps.file import Hyperband, Parameter, SweepFile

if TYPE_CHECKING:
    from optuna.study import Study

CONTENT = "sweep"  # the study's attribute that holds the file
SURPLUS = "surplus"  # the trial's attribute, of a number beyond the sweep's that two machines took at once
QUANTILE = " (quantile)"  # a normal parameter is searched by its quantile, and the study shows that
_EDGE = 1e-6
BAYES = ("tpe", "gp")
_BEING_MADE = ("already exists", "no such table", "UNIQUE constraint", "is locked")


def searched(sweep: SweepFile) -> list[Parameter]:
    """The parameters that have more than one value."""
    return [parameter for parameter in sweep.parameters if not isinstance(parameter.distribution, Constant)]


def study_name(parameter: Parameter) -> str:
    """A parameter's name in the study."""
    return parameter.name + (QUANTILE if isinstance(parameter.distribution, Normal) else "")


def space(sweep: SweepFile) -> dict[str, BaseDistribution]:
    """Optuna's distribution of each searched parameter, by its name in the study."""
    return {study_name(parameter): _optuna(parameter.distribution) for parameter in searched(sweep)}


def _optuna(distribution: Distribution) -> BaseDistribution:
    match distribution:
        case Categorical(choices):
            return CategoricalDistribution([_label(choice) for choice in choices])
        case IntUniform(low, high):
            return IntDistribution(low, high)
        case Uniform(low, high):
            return FloatDistribution(low, high)
        case QUniform(q=q):
            low, high = distribution.multiple(distribution.first), distribution.multiple(distribution.last)
            if isinstance(q, int):
                return IntDistribution(int(low), int(high), step=q)
            return FloatDistribution(low, high, step=q)
        case Normal():
            return FloatDistribution(_EDGE, 1 - _EDGE)
        case LogUniform(low, high):
            return FloatDistribution(low, high, log=True)
    raise TypeError(f"{distribution!r} is not searched")


def _label(choice: Any) -> Any:
    """Return a choice as studies keep it: lists and mappings as JSON, and so a text that could be taken for one."""
    is_plain = not isinstance(choice, list | dict) and not str(choice).startswith(("[", "{", '"'))
    return choice if is_plain else json.dumps(choice)


def to_study(parameter: Parameter, value: Any) -> Any:
    """Return a value of the file as the study has it."""
    return _label(value) if isinstance(parameter.distribution, Categorical) else value


def values_of(sweep: SweepFile, found: Mapping[str, Any]) -> dict[str, Any]:
    """Every parameter's value by name, of a trial's parameters in the study."""
    made = {}
    for parameter in sweep.parameters:
        distribution = parameter.distribution
        match distribution:
            case Constant(value):
                made[parameter.name] = value
            case Normal():
                made[parameter.name] = distribution.at(found[study_name(parameter)])
            case Categorical(choices):
                made[parameter.name] = next(choice for choice in choices if _label(choice) == found[parameter.name])
            case QUniform():
                made[parameter.name] = distribution.multiple(round(found[parameter.name] / distribution.q))
            case _:
                made[parameter.name] = found[parameter.name]
    return made


# ---- the grid


def grid_size(sweep: SweepFile) -> int:
    """Return the number of combinations."""
    return math.prod(parameter.distribution.size or 0 for parameter in searched(sweep))  # each has a size


def grid_point(sweep: SweepFile, number: int) -> dict[str, Any]:
    """The combination of that number, by name in the study; the file's last parameter varies fastest."""
    point: dict[str, Any] = {}
    for parameter in reversed(searched(sweep)):
        size = parameter.distribution.size
        assert size is not None  # grids of others were refused with the file
        number, place = divmod(number, size)
        point[study_name(parameter)] = to_study(parameter, parameter.distribution.nth(place))
    return dict(reversed(point.items()))


# ---- samplers


class ByNumber(BaseSampler):
    """Gives each parameter what a function of the trial's number says."""

    def __init__(self, value: Callable[[int, str], Any]) -> None:
        self._value = value

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._value(trial.number, param_name)


class Reseeded(BaseSampler):
    """Optuna's sampler, made anew for each trial with a seed from its number: what was drawn is not drawn again."""

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make = make
        self._seed = seed
        self._own = make(seed)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._own = self._make(int(np.random.SeedSequence([self._seed, trial.number]).generate_state(1)[0]))
        self._own.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._own.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._own.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._own.sample_independent(study, trial, param_name, param_distribution)


def sampler(sweep: SweepFile, bayes: str, seed: int) -> BaseSampler:
    """The file's method.

    Args:
        sweep: the file.
        bayes: "tpe" or "gp", what `method: bayes` means.
        seed: of random and bayes.
    """
    by_name = {study_name(parameter): parameter for parameter in searched(sweep)}
    if sweep.method == "grid":
        count = grid_size(sweep)
        return ByNumber(lambda number, name: grid_point(sweep, number % count)[name])
    if sweep.method == "random":

        def draw(number: int, name: str) -> Any:
            parameter = by_name[name]
            quantile = _quantile(seed, number, name)
            if isinstance(parameter.distribution, Normal):
                return min(max(quantile, _EDGE), 1 - _EDGE)
            return to_study(parameter, parameter.distribution.at(quantile))

        return ByNumber(draw)
    if bayes == "gp":
        return Reseeded(lambda own: optuna.samplers.GPSampler(seed=own), seed)
    return Reseeded(lambda own: optuna.samplers.TPESampler(seed=own, constant_liar=True), seed)


def _quantile(seed: int, number: int, name: str) -> float:
    """Uniform in (0, 1), of the seed, the trial and the parameter."""
    return float(np.random.default_rng([seed, number, zlib.crc32(name.encode())]).uniform(1e-12, 1.0))


class HyperbandBands(optuna.pruners.BasePruner):
    """W&B's hyperband: at each band a trial goes on if its metric is among the best 1/eta that came as far.

    W&B compares all runs in one bracket, by counts of logged values; Optuna's HyperbandPruner shares trials among
    brackets by steps, and would stop others than W&B does with the same file. Trials report their n-th logged value
    as step n.
    """

    def __init__(self, rule: Hyperband) -> None:
        self._rule = rule

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        histories = [h for other in study.get_trials(deepcopy=False) if (h := _history(study, other))]
        return stops(self._rule, _history(study, trial), histories)


def _history(study: Study, trial: FrozenTrial) -> list[float]:
    """A trial's values by count, smaller is better; what is no finite number is left out, as W&B does."""
    sign = -1.0 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1.0
    values = [trial.intermediate_values[step] for step in sorted(trial.intermediate_values)]
    return [sign * value for value in values if math.isfinite(value)]


def stops(rule: Hyperband, history: Sequence[float], histories: Sequence[Sequence[float]]) -> bool:
    """Whether a run with this history is stopped among all runs' histories, its own included."""
    reached = [band for band in rule.bands if band <= len(history)]
    if not reached:
        return False
    band = reached[-1]
    peers = sorted(other[band - 1] for other in histories if len(other) >= band)
    if not peers:
        return False
    threshold = peers[int(len(peers) * (1.0 / rule.eta))]
    value = history[band - 1] if rule.strict else min(history)
    return value > threshold


# ---- the study


def storage_of(address: str) -> optuna.storages.BaseStorage:
    """Optuna's storage of a database URL, or of a journal file's path.

    Raises:
        InputError: it cannot be opened.
    """
    if "://" not in address:
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        try:
            Path(address).parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(address))
        except OSError as error:
            raise InputError(f"--study {address!r} cannot be opened: {error.strerror}") from None
    from sqlalchemy.exc import SQLAlchemyError

    options = {"connect_args": {"timeout": 60}} if address.startswith("sqlite:") else {"pool_pre_ping": True}
    waits = [0.2, 0.4, 0.8, 1.6]
    while True:
        try:
            return optuna.storages.RDBStorage(address, engine_kwargs=options)
        except (SQLAlchemyError, ImportError, ValueError) as error:
            words = " ".join(str(getattr(error, "orig", None) or error).split())
            # Another sweep may be making the tables in this moment; they are whole a moment later.
            if not waits or not any(text in words for text in _BEING_MADE):
                raise InputError(f"--study {address!r} cannot be opened: {words}") from None
        time.sleep(waits.pop(0))


def open_study(
    sweep: SweepFile, address: str, bayes: str = "tpe", seed: int = 0, *, may_replace: bool = False
) -> Study:
    """Return the sweep's study, made where there is none.

    Args:
        sweep: the file.
        address: of the storage.
        bayes: "tpe" or "gp", what `method: bayes` means.
        seed: of random and bayes.
        may_replace: make a study anew that another file began and that has no trial.

    Raises:
        InputError: the storage cannot be opened, or its study of this name is of another sweep.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = storage_of(address)
    study = _study(sweep, storage, bayes, seed)
    begun = study.user_attrs.get(CONTENT)
    if may_replace and begun is not None and begun != _content(sweep) and not study.get_trials(deepcopy=False):
        optuna.delete_study(study_name=sweep.name, storage=storage)
        study = _study(sweep, storage, bayes, seed)
    content = _content(sweep)
    found = study.user_attrs.get(CONTENT)
    if found is None:
        study.set_user_attr(CONTENT, content)
        with warnings.catch_warnings():  # it calls the dashboard's names experimental
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([sweep.metric.name])
    elif found != content:
        raise InputError(
            f"study {sweep.name!r} of {address} was begun with {_differing(found, content)} otherwise; give the sweep "
            "another `name`, or another --out or --study"
        )
    return study


def _study(sweep: SweepFile, storage: optuna.storages.BaseStorage, bayes: str, seed: int) -> Study:
    return optuna.create_study(
        storage=storage,
        study_name=sweep.name,
        direction="maximize" if sweep.metric.maximize else "minimize",
        sampler=sampler(sweep, bayes, seed),
        pruner=optuna.pruners.NopPruner() if sweep.early_terminate is None else HyperbandBands(sweep.early_terminate),
        load_if_exists=True,
    )


def _content(sweep: SweepFile) -> str:
    return json.dumps(search_of(sweep), sort_keys=True)


def search_of(sweep: SweepFile) -> dict[str, Any]:
    """What may not change while a sweep goes on."""
    keys = ("program", "method", "metric", "parameters", "early_terminate")
    return {key: sweep.content.get(key) for key in keys} | {"command": list(sweep.command)}


def _differing(one: str, other: str) -> str:
    mine, theirs = json.loads(one), json.loads(other)
    return ", ".join(key for key in sorted({*mine, *theirs}) if mine.get(key) != theirs.get(key))
