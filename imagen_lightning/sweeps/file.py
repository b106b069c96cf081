"""A W&B sweep file, read strictly: what is not known is refused by name, since W&B would ignore or refuse it too.

The keys are those of W&B's sweep configuration (https://docs.wandb.ai/models/sweeps/define-sweep-configuration); what
W&B implies is implied here: `value` is a constant, `values` are categorical, `min` and `max` are uniform, over integers
where both are.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagen_lightning.catalog import higher_is_better
from imagen_lightning.errors import InputError
from imagen_lightning.io.yaml import MAX_BYTES, read_yaml
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

METHODS = ("grid", "random", "bayes")
DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
_KEYS = {
    *("program", "command", "method", "metric", "parameters", "early_terminate", "run_cap"),
    *("name", "description", "project", "entity"),
}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,499}")  # what W&B takes, and databases hold
_SWEEP_NAME = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,200}")
_UNSPOKEN = re.compile("[\x00\ud800-\udfff]")  # no command line holds these
_MAX_INT = 2**53  # beyond, numbers in studies are rounded
_MAX_VALUE = 10**300  # what a float can nearly be
_MAX_STEPS = 10**9
_MAX_BANDS = 1000


@dataclass(frozen=True)
class Metric:
    """What the search looks at: the metric's name in the run's logs, and which way is better."""

    name: str
    maximize: bool


@dataclass(frozen=True)
class Hyperband:
    """`early_terminate`: when W&B stops runs; iterations count the metric's logged values.

    Attributes:
        bands: rising numbers of logged values at which runs are compared.
        eta: the best 1/eta of the runs go on.
        strict: compare the value at the band, not the best so far.
    """

    bands: tuple[int, ...]
    eta: float
    strict: bool


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        path: its keys: one (which may hold dots) for a flat parameter, several for one inside nested `parameters`.
        distribution: its values.
    """

    path: tuple[str, ...]
    distribution: Distribution

    @property
    def name(self) -> str:
        """The name in studies and tables, the same for flat and nested spelling."""
        return ".".join(self.path)


@dataclass(frozen=True)
class SweepFile:
    """A sweep.

    Attributes:
        path: of the file.
        content: as the YAML has it.
        program, command: of a trial.
        method: "grid", "random" or "bayes".
        parameters: in the file's order.
        early_terminate: None to let every trial finish.
        run_cap: the most trials that W&B would run.
    """

    path: Path
    content: Mapping[str, Any]
    program: str | None
    command: tuple[str, ...]
    method: str
    metric: Metric
    parameters: tuple[Parameter, ...]
    early_terminate: Hyperband | None = None
    run_cap: int | None = None

    @property
    def name(self) -> str:
        found = self.content.get("name")
        return self.path.stem if found is None else str(found)


def read_sweep(path: Path) -> SweepFile:
    """Read a sweep file.

    Raises:
        InputError: it cannot be read, or holds what W&B or this search does not know; the message names it.
    """
    what = f"sweep file {str(path)!r}"
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1).decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{what} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{what} is not valid YAML: it is not UTF-8") from None
    content = read_yaml(text, what)
    try:
        return _sweep(path, content)
    except InputError as error:
        text = str(error)
        raise InputError(f"{path}: {text if len(text) < 500 else f'{text[:250]} ... {text[-200:]}'}") from None


def _sweep(path: Path, content: Any) -> SweepFile:
    if not isinstance(content, dict):
        raise InputError("a sweep file holds keys such as method, metric and parameters")
    _known("", content, _KEYS)
    name = content.get("name", path.stem)
    if name is not None and (isinstance(name, bool | list | dict) or not _SWEEP_NAME.fullmatch(str(name))):
        raise InputError(f"name is {name!r}; give a text of at most 200 characters")
    method = content.get("method")
    if method not in METHODS:
        raise InputError(f"method is {method!r}; use grid, random or bayes")
    program = content.get("program")
    if program is not None and (not isinstance(program, str) or not program or _UNSPOKEN.search(program)):
        raise InputError(f"program is {program!r}; give the name of a program")
    command = content.get("command", list(DEFAULT_COMMAND))
    if not isinstance(command, list) or not command:
        raise InputError("command must be a list of words such as ${program} and ${args}")
    for word in command:
        if isinstance(word, bool) or not isinstance(word, str | int | float) or _UNSPOKEN.search(str(word)):
            raise InputError(f"command holds {word!r}; give texts and numbers, in quotes where YAML reads others")
    if program is None and "${program}" in command:
        raise InputError("program is missing, and the command asks for it")
    run_cap = content.get("run_cap")
    if run_cap is not None and (not _is_int(run_cap) or run_cap < 1):
        raise InputError(f"run_cap is {run_cap!r}; give a whole number of trials")
    parameters = tuple(_parameters(content.get("parameters"), ()))
    names = Counter(parameter.name for parameter in parameters)
    twice = sorted(name for name, count in names.items() if count > 1)
    if twice:
        raise InputError(f"parameter {twice[0]} is given twice, flat and nested; keep one")
    if method == "grid":
        for parameter in parameters:
            if parameter.distribution.size is None:
                raise InputError(
                    f"parameters.{parameter.name}: a grid needs values that can be listed; give `values`, or take "
                    "method random or bayes"
                )
    return SweepFile(
        path,
        content,
        program,
        tuple(str(word) for word in command),
        method,
        _metric(content.get("metric")),
        parameters,
        None if content.get("early_terminate") is None else _hyperband(content["early_terminate"]),
        run_cap,
    )


def _metric(content: Any) -> Metric:
    if not isinstance(content, dict) or not isinstance(content.get("name"), str) or not content["name"]:
        raise InputError("metric needs a name, by which trials are compared: metric: {name: val/loss, goal: minimize}")
    _known("metric", content, {"name", "goal"})
    goal = content.get("goal", "minimize")
    if goal not in ("minimize", "maximize"):
        raise InputError(f"metric.goal is {goal!r}; use minimize or maximize")
    better = higher_is_better(content["name"])
    if better is not None and better != (goal == "maximize"):
        given = "is" if "goal" in content else "defaults to"
        way, right = ("higher", "maximize") if better else ("lower", "minimize")
        name = content["name"]
        raise InputError(f"metric.goal {given} {goal}, but {name!r} is better when {way}; set goal: {right}")
    return Metric(content["name"], goal == "maximize")


def _hyperband(content: Any) -> Hyperband:
    if not isinstance(content, dict) or content.get("type") != "hyperband":
        raise InputError("early_terminate.type must be hyperband, the one that W&B has")
    _known("early_terminate", content, {"type", "min_iter", "max_iter", "s", "eta", "strict"})
    eta = content.get("eta", 3)
    if not _is_number(eta) or not 1 < eta <= _MAX_INT:
        raise InputError(f"early_terminate.eta is {eta!r}; give a number above 1")
    strict = content.get("strict", True)
    if not isinstance(strict, bool):
        raise InputError(f"early_terminate.strict is {strict!r}; use true or false")
    for key in ("min_iter", "max_iter", "s"):
        most = _MAX_BANDS if key == "s" else _MAX_INT
        if key in content and (not _is_int(content[key]) or not 1 <= content[key] <= most):
            raise InputError(f"early_terminate.{key} is {content[key]!r}; give a whole number in 1..{most}")
    if "max_iter" in content:
        if "s" not in content:
            raise InputError("early_terminate.max_iter needs s, the number of bands below it")
        bands = _powers(lambda factor: int(content["max_iter"] / factor), eta, range(1, content["s"] + 1))
        if not bands:
            raise InputError(f"early_terminate: no band lies below max_iter {content['max_iter']}; lower eta")
    elif "min_iter" in content:
        bands = _powers(lambda factor: int(content["min_iter"] * factor), eta, range(100))
    else:
        raise InputError("early_terminate needs min_iter, or max_iter and s")
    return Hyperband(tuple(sorted(set(bands))), float(eta), strict)


def _powers(band: Callable[[float], int], eta: float, powers: range) -> list[int]:
    """Return the bands of eta's powers, as far as they are steps that a trial can come to."""
    found = []
    for power in powers:
        if power * math.log(eta) > math.log(_MAX_INT) or not 1 <= band(eta**power) <= _MAX_INT:
            break
        found.append(band(eta**power))
    return found


# ---- parameters


def _parameters(content: Any, path: tuple[str, ...]) -> Iterator[Parameter]:
    where = ".".join(("parameters", *path))
    if not isinstance(content, dict) or not content:
        raise InputError(f"{where} must name at least one parameter")
    for name, entry in content.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InputError(f"{where}: {name!r} is not a parameter's name: letters, digits, dots, hyphens")
        place = (*path, name)
        if not isinstance(entry, dict):
            raise InputError(f"{where}.{name}: give `value`, `values`, or `min` and `max`, not {entry!r}")
        if "parameters" in entry:
            _known(f"{where}.{name}", entry, {"parameters"})
            yield from _parameters(entry["parameters"], place)
        else:
            yield Parameter(place, _distribution(f"{where}.{name}", entry))


def _distribution(where: str, entry: Mapping[str, Any]) -> Distribution:
    name = entry["distribution"] if "distribution" in entry else _implied(where, entry)
    if not isinstance(name, str) or name not in _DISTRIBUTIONS:
        raise InputError(f"{where}: distribution {name!r} is not supported; use {', '.join(_DISTRIBUTIONS)}")
    keys, make = _DISTRIBUTIONS[name]
    _known(where, entry, {"distribution", *keys})
    return make(where, entry)


def _implied(where: str, entry: Mapping[str, Any]) -> str:
    if "probabilities" in entry:
        raise InputError(f"{where}: probabilities are not supported; repeat no value, or use another distribution")
    if "value" in entry:
        return "constant"
    if "values" in entry:
        return "categorical"
    if "min" in entry and "max" in entry:
        return "int_uniform" if _is_int(entry["min"]) and _is_int(entry["max"]) else "uniform"
    raise InputError(f"{where}: give `value`, `values`, or `min` and `max`")


def _constant(where: str, entry: Mapping[str, Any]) -> Distribution:
    if "value" not in entry:
        raise InputError(f"{where}: a constant needs `value`")
    return Constant(_json_value(where, entry["value"]))


def _categorical(where: str, entry: Mapping[str, Any]) -> Distribution:
    values = entry.get("values")
    if not isinstance(values, list) or not values:
        raise InputError(f"{where}: `values` must be a list of at least one value")
    seen: set[Any] = set()
    for value in values:
        _json_value(where, value)
        key = json.dumps(value, sort_keys=True) if isinstance(value, list | dict) else value
        if (isinstance(value, list | dict), key) in seen:
            raise InputError(f"{where}: value {value!r} stands twice")
        seen.add((isinstance(value, list | dict), key))
    return Categorical(tuple(values))


def _json_value(where: str, value: Any) -> Any:
    """Return a value that can be written as JSON, and so on a command line and in a study; refuse any other."""
    match value:
        case None | bool():
            pass
        case int():
            if abs(value) > _MAX_VALUE:
                raise InputError(f"{where}: a whole number of {len(str(abs(value)))} digits is too large")
        case float():
            if not math.isfinite(value):
                raise InputError(f"{where}: {value!r} is not a number; give a finite one")
        case str():
            if found := _UNSPOKEN.search(value):
                raise InputError(f"{where}: {value!r} holds the character {found[0]!r}, which no command line can hold")
        case list():
            for item in value:
                _json_value(where, item)
        case dict():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise InputError(f"{where}: key {key!r} is not a text; write it in quotes")
                _json_value(where, key)
                _json_value(where, item)
        case _:
            kind = type(value).__name__
            raise InputError(f"{where}: {str(value)!r} is read as a {kind}; write a text in quotes")
    return value


def _int_uniform(where: str, entry: Mapping[str, Any]) -> Distribution:
    low, high = _bounds(where, entry)
    if not _is_int(low) or not _is_int(high):
        raise InputError(f"{where}: int_uniform takes whole numbers, not {low!r} and {high!r}")
    return IntUniform(low, high)


def _q_uniform(where: str, entry: Mapping[str, Any]) -> Distribution:
    q = entry.get("q", 1)
    if not _is_number(q) or not q > 0:
        raise InputError(f"{where}: q is {q!r}; give a number above 0")
    low, high = _bounds(where, entry)
    if not max(abs(low), abs(high)) / q <= _MAX_STEPS:
        raise InputError(f"{where}: min {low} and max {high} are more than {_MAX_STEPS:,} times q {q}; raise q")
    return QUniform(low, high, q)


def _normal(where: str, entry: Mapping[str, Any]) -> Distribution:
    mu, sigma = entry.get("mu", 0.0), entry.get("sigma", 1.0)
    if not _is_number(mu) or not _is_number(sigma) or not sigma > 0:
        raise InputError(f"{where}: mu {mu!r} and sigma {sigma!r} must be numbers, sigma above 0")
    if not math.isfinite(abs(mu) + 100 * sigma):
        raise InputError(f"{where}: mu {mu!r} and sigma {sigma!r} are too large for numbers")
    return Normal(float(mu), float(sigma))


def _log_uniform(where: str, entry: Mapping[str, Any]) -> Distribution:
    low, high = _bounds(where, entry)
    if not low > 0:
        raise InputError(f"{where}: log_uniform_values takes the values themselves, above 0, not {low!r}")
    return LogUniform(float(low), float(high))


def _uniform(where: str, entry: Mapping[str, Any]) -> Distribution:
    low, high = _bounds(where, entry)
    return Uniform(float(low), float(high))


def _bounds(where: str, entry: Mapping[str, Any]) -> tuple[Any, Any]:
    low, high = entry.get("min"), entry.get("max")
    for key, value in (("min", low), ("max", high)):
        if not _is_number(value):
            hint = "; YAML takes 1e-4 for a text, write 1.0e-4" if isinstance(value, str) else ""
            raise InputError(f"{where}: {key} is {value!r}, not a number{hint}")
    if not low < high:  # type: ignore[operator]
        raise InputError(f"{where}: min {low} is not below max {high}")
    if not math.isfinite(high - low):  # type: ignore[operator]
        raise InputError(f"{where}: min {low} and max {high} are further apart than numbers reach")
    return low, high


_DISTRIBUTIONS: dict[str, tuple[tuple[str, ...], Callable[[str, Mapping[str, Any]], Distribution]]] = {
    "constant": (("value",), _constant),
    "categorical": (("values",), _categorical),
    "uniform": (("min", "max"), _uniform),
    "int_uniform": (("min", "max"), _int_uniform),
    "q_uniform": (("min", "max", "q"), _q_uniform),
    "normal": (("mu", "sigma"), _normal),
    "log_uniform_values": (("min", "max"), _log_uniform),
}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return _is_int(value) and abs(value) <= _MAX_INT


def _known(where: str, content: Mapping[str, Any], keys: Sequence[str] | set[str]) -> None:
    for key in content:
        if key not in keys:
            near = difflib.get_close_matches(str(key), sorted(keys), n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; use {', '.join(sorted(keys))}"
            raise InputError(f"{where + ': ' if where else ''}{key!r} is not supported{hint}")
