"""Whether two values of one metric can be told apart."""

from __future__ import annotations

import math

from imagen_lightning.catalog import is_deviation
from imagen_lightning.metrics.protocol import Value

_ROUNDING = 1e-7  # distances of equal sets differ by less


def is_alike(one: Value, other: Value) -> bool:
    """Return whether one value's 95% interval holds the other, or they are equal but for rounding."""
    if math.isclose(one.value, other.value, rel_tol=1e-9, abs_tol=_ROUNDING):
        return True
    return _holds(one, other.value) or _holds(other, one.value)


def has_interval(value: Value) -> bool:
    return value.low is not None and value.high is not None


def _holds(value: Value, number: float) -> bool:
    if value.low is None or value.high is None:
        return False
    reach = 1.96 if is_deviation(value.confidence) else 1.0
    below, above = reach * (value.value - value.low), reach * (value.high - value.value)
    return value.value - below <= number <= value.value + above
