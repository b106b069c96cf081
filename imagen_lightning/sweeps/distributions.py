"""What a sweep file says of a parameter: W&B's distributions, by their quantiles.

Each distribution gives the value at a quantile u in (0, 1), so that random search draws by the file's own law, and
where it has finitely many values the n-th of them, so that a grid is exact and never listed as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar, Protocol


class Distribution(Protocol):
    """One parameter's values."""

    def at(self, quantile: float) -> Any:
        """The value at a quantile in (0, 1)."""
        ...

    @property
    def size(self) -> int | None:
        """The number of values; None where there are infinitely many."""
        ...

    def nth(self, place: int) -> Any:
        """The value at a place in 0..size-1, in order."""
        ...

    def examples(self) -> Sequence[Any]:
        """Few values by which a command can be checked: all of a list, the ends of a range."""
        ...


class Continuous:
    """Infinitely many values, which no grid lists."""

    size: ClassVar[None] = None

    def nth(self, place: int) -> Any:
        raise TypeError(f"{self!r} cannot be listed")


@dataclass(frozen=True)
class Constant:
    """`value: …`."""

    value: Any

    size: ClassVar[int] = 1

    def at(self, quantile: float) -> Any:
        return self.value

    def nth(self, place: int) -> Any:
        return self.value

    def examples(self) -> Sequence[Any]:
        return [self.value]


@dataclass(frozen=True)
class Categorical:
    """`values: […]`, each as likely."""

    choices: tuple[Any, ...]

    def at(self, quantile: float) -> Any:
        return self.choices[min(int(quantile * len(self.choices)), len(self.choices) - 1)]

    @property
    def size(self) -> int:
        return len(self.choices)

    def nth(self, place: int) -> Any:
        return self.choices[place]

    def examples(self) -> Sequence[Any]:
        return self.choices


@dataclass(frozen=True)
class IntUniform:
    """Integers from `min` to `max`, both included."""

    min: int
    max: int

    def at(self, quantile: float) -> int:
        return min(self.min + int(quantile * self.size), self.max)

    @property
    def size(self) -> int:
        return self.max - self.min + 1

    def nth(self, place: int) -> int:
        return self.min + place

    def examples(self) -> Sequence[int]:
        return [self.min, self.max]


@dataclass(frozen=True)
class Uniform(Continuous):
    """Real numbers between `min` and `max`."""

    min: float
    max: float

    def at(self, quantile: float) -> float:
        return self.min + quantile * (self.max - self.min)

    def examples(self) -> Sequence[float]:
        return [self.min, self.max]


@dataclass(frozen=True)
class QUniform:
    """`round(X / q) * q` with X uniform between `min` and `max`; whole numbers where `q` is one."""

    min: float
    max: float
    q: float

    @property
    def first(self) -> int:
        """The lowest multiple of q, in q."""
        return round(self.min / self.q)

    @property
    def last(self) -> int:
        return round(self.max / self.q)

    def multiple(self, count: int) -> float:
        """`count * q` without the tail that binary fractions bring (0.30000000000000004)."""
        return count * self.q if isinstance(self.q, int) else float(f"{count * self.q:.12g}")

    def at(self, quantile: float) -> float:
        return self.multiple(round((self.min + quantile * (self.max - self.min)) / self.q))

    @property
    def size(self) -> int:
        return self.last - self.first + 1

    def nth(self, place: int) -> float:
        return self.multiple(self.first + place)

    def examples(self) -> Sequence[float]:
        return [self.multiple(self.first), self.multiple(self.last)]


@dataclass(frozen=True)
class Normal(Continuous):
    """A Gaussian of mean `mu` and standard deviation `sigma`."""

    mu: float
    sigma: float

    def at(self, quantile: float) -> float:
        return NormalDist(self.mu, self.sigma).inv_cdf(quantile)

    def examples(self) -> Sequence[float]:
        return [self.at(0.001), self.at(0.999)]


@dataclass(frozen=True)
class LogUniform(Continuous):
    """`log_uniform_values`: numbers between `min` and `max` whose logarithm is uniform."""

    min: float
    max: float

    def at(self, quantile: float) -> float:
        low, high = math.log(self.min), math.log(self.max)
        return min(max(math.exp(low + quantile * (high - low)), self.min), self.max)

    def examples(self) -> Sequence[float]:
        return [self.min, self.max]
