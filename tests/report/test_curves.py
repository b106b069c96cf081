"""Smoothing and thinning of curves."""

import numpy as np
import pytest

from imagen_lightning.report.curves import SMOOTHING, smooth, thin
from imagen_lightning.report.runs import Curve


def test_smoothing_is_the_weighted_mean_of_what_came_before():
    random = np.random.default_rng(0)
    steps = np.cumsum(random.integers(1, 200, 300))
    curve = Curve(steps, random.normal(size=300))
    tau = SMOOTHING * (steps[-1] - steps[0])
    weights = np.tril(np.exp(-np.maximum(steps[:, None] - steps[None], 0) / tau))
    expected = weights @ curve.values / weights.sum(1)
    np.testing.assert_allclose(smooth(curve).values, expected, rtol=1e-12)


def test_smoothing_leaves_a_constant_and_drops_what_is_not_finite():
    curve = Curve(np.arange(50), np.where(np.arange(50) % 7 == 3, np.nan, 2.5))
    found = smooth(curve)
    np.testing.assert_allclose(found.values, 2.5, rtol=1e-14)
    assert len(found.steps) == np.isfinite(curve.values).sum()
    assert list(smooth(Curve(np.array([5]), np.array([1.0]))).values) == [1.0]


@pytest.mark.parametrize("count", [10, 400, 401, 5000])
def test_thinning_keeps_ends_and_extremes(count):
    random = np.random.default_rng(count)
    curve = Curve(np.arange(count) * 3, random.normal(size=count))
    found = thin(curve, 400)
    assert len(found.steps) <= 400
    assert (np.diff(found.steps) > 0).all()
    for end in (0, -1):
        assert (found.steps[end], found.values[end]) == (curve.steps[end], curve.values[end])
    assert {curve.values.min(), curve.values.max()} <= set(found.values)
    assert len(found.steps) == count or count > 400
