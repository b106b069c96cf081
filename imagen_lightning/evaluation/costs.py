"""Which stage costs how much: a metric of the last stage's images, with real images in the place of earlier stages.

Let q_k be the quality of the final images where the stages before stage k are replaced by real images at that stage's
input size, so that q_0 is the whole cascade's and q_K that of the real images themselves. Stage k costs q_(k+1) - q_k:
what its own images, in the place of real ones, take from the end result. The costs add up to what the cascade lacks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_BOOTSTRAP = 2000
SMALL_POINTS, SMALL_FRACTION = 0.05, 0.1  # a cost that does not matter: of shares; of the whole cascade's value


@dataclass(frozen=True)
class Quality:
    """A metric of the final images.

    Attributes:
        value: the number.
        per_image: (N,) float64, whose mean is the value, where the metric has such; costs are then compared in pairs.
        margin: half the width of the value's interval where there is no `per_image`.
    """

    value: float
    per_image: Tensor | None = None
    margin: float | None = None


@dataclass(frozen=True)
class Cost:
    """What one stage takes from the end result, in the metric's unit; more is worse.

    low to high holds 95%; both are None where a quality has no interval.
    """

    stage: str
    value: float
    low: float | None
    high: float | None

    def exceeds(self, other: Cost) -> bool:
        """Whether it is more than another stage's cost by more than chance may give."""
        if self.low is None or other.high is None:
            return False
        return self.value - other.value > math.hypot(self.value - self.low, other.high - other.value)


@dataclass(frozen=True)
class Judgement:
    """The costs of all stages by one metric.

    Attributes:
        metric: its name.
        unit: behind its numbers, " points" for shares in percent.
        scale: numbers are multiplied by it for people, 100 for shares.
        costs: a stage's each, in the cascade's order.
        small: a cost that does not matter.
    """

    metric: str
    unit: str
    scale: float
    costs: tuple[Cost, ...]
    small: float

    @property
    def worst(self) -> Cost:
        return max(self.costs, key=lambda cost: cost.value)

    @property
    def is_clear(self) -> bool:
        """Whether the worst cost is surely above zero, and above the others by more than chance may give."""
        worst = self.worst
        return bool(worst.low is not None and worst.low > 0) and all(
            worst.exceeds(cost) for cost in self.costs if cost is not worst
        )

    def sentence(self) -> str:
        """One line for people."""
        lacks = sum(cost.value for cost in self.costs)
        parts = ", ".join(f"{cost.stage} {self._number(cost.value)}" for cost in self.costs)
        worst = self.worst
        loses = f"the cascade loses {self._number(lacks)}{self.unit} against real images ({parts})"
        if worst.low is None or worst.high is None:
            return f"which stage costs the most by {self.metric} cannot be told without intervals: {loses}"
        interval = f"{self._number(worst.low)} to {self._number(worst.high)}"
        if not self.is_clear and all(cost.high is not None and cost.high <= self.small for cost in self.costs):
            return f"no stage costs much by {self.metric}: {loses}, {worst.stage}'s part being {interval}"
        if not self.is_clear:
            return (
                f"no stage stands out by {self.metric}: {loses}, {worst.stage}'s part being {interval}: more samples "
                "would tell"
            )
        return (
            f"{worst.stage} costs the most: {self._number(worst.value)}{self.unit} of {self.metric} ({interval}) of "
            f"the {self._number(lacks)} that the cascade loses against real images ({parts})"
        )

    def _number(self, value: float) -> str:
        return f"{value * self.scale:.3g}"


def judge(
    metric: str, stages: Sequence[str], qualities: Sequence[Quality], *, higher_is_better: bool, percent: bool
) -> Judgement:
    """The stages' costs.

    Args:
        metric: the name of what was measured.
        stages: K names in the cascade's order.
        qualities: q_0 … q_K, see the module.
        higher_is_better: of the metric.
        percent: the metric is a share, shown in points of percent.

    Raises:
        ValueError: another number of qualities than stages and one.
    """
    if len(qualities) != len(stages) + 1:
        raise ValueError(f"{len(qualities)} qualities for {len(stages)} stages; there must be one more")
    sign = 1.0 if higher_is_better else -1.0
    costs = []
    for stage, with_it, without in zip(stages, qualities, qualities[1:]):
        value = sign * (without.value - with_it.value)
        costs.append(Cost(stage, value, *_interval(value, sign, with_it, without)))
    small = SMALL_POINTS if percent else SMALL_FRACTION * abs(qualities[0].value)
    return Judgement(metric, " points" if percent else "", 100.0 if percent else 1.0, tuple(costs), small)


def _interval(value: float, sign: float, with_it: Quality, without: Quality) -> tuple[float, float] | tuple[None, None]:
    """95% of the cost: by bootstrap over the images, in pairs; else the two intervals' widths in quadrature."""
    if with_it.per_image is not None and without.per_image is not None:
        gains = sign * (without.per_image - with_it.per_image).double()
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(len(gains), (NUM_BOOTSTRAP, len(gains)), generator=generator)
        low, high = torch.quantile(gains[rows].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return low, high
    if with_it.margin is None or without.margin is None:
        return None, None
    margin = math.hypot(with_it.margin, without.margin)
    return value - margin, value + margin
