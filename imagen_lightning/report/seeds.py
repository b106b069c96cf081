"""What seeds alone do: settings over their seeds, with intervals, and whether a difference is beyond these."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from imagen_lightning.report.studies import FoundSweep

SEEDS = ("seed", "seed_everything", "model.init_args.seed", "data.init_args.seed")


@dataclass(frozen=True)
class Group:
    """Finished trials that differ by their seeds alone.

    Attributes:
        values: of the parameters but the seeds.
        metric: of each trial.
        half: half of the 95% confidence interval of the mean, by Student's t; None for one trial.
    """

    values: Mapping[str, Any]
    metric: Sequence[float]
    half: float | None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.metric)


def groups(sweep: FoundSweep) -> list[Group]:
    """Settings with their seeds, the best mean first; [] where no setting was tried with two seeds."""
    from scipy import stats

    found: dict[str, tuple[dict[str, Any], list[float]]] = {}
    for trial in sweep.finished:
        settings = {name: trial.values.get(name) for name in sweep.names if name not in SEEDS}
        assert trial.value is not None
        found.setdefault(json.dumps(settings, sort_keys=True), (settings, []))[1].append(trial.value)
    if not any(len(values) > 1 for _, values in found.values()):
        return []
    made = []
    for settings, values in found.values():
        half = None
        if len(values) > 1:
            half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
        made.append(Group(settings, values, half))
    return sorted(made, key=lambda group: -group.mean if sweep.maximize else group.mean)


def difference(one: Group, other: Group) -> tuple[float, float] | None:
    """The 95% interval of the difference of two means by Welch's t test, None for a setting with one seed."""
    from scipy import stats

    if len(one.metric) < 2 or len(other.metric) < 2:
        return None
    gap = one.mean - other.mean
    parts = [statistics.variance(group.metric) / len(group.metric) for group in (one, other)]
    error = math.sqrt(sum(parts))
    if error == 0:
        return gap, gap
    freedom = error**4 / sum(part**2 / (len(group.metric) - 1) for part, group in zip(parts, (one, other)))
    half = float(stats.t.ppf(0.975, freedom)) * error
    return gap - half, gap + half


def within(one: Group, other: Group) -> bool | None:
    """Whether a difference may be the seeds'; None where that cannot be said."""
    interval = difference(one, other)
    return None if interval is None else interval[0] <= 0 <= interval[1]
