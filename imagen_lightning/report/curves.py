"""Curves for people: smoothed, and with no more points than a screen shows."""

from __future__ import annotations

import numpy as np

from imagen_lightning.report.runs import Curve

SMOOTHING = 0.02  # time constant, as a share of the run
MAX_POINTS = 400


def smooth(curve: Curve, share: float = SMOOTHING) -> Curve:
    """An exponential moving average whose weights fall by e within `share` of the curve's steps.

    It is unbiased from its first value on and aware of unequal distances between steps; values that are not
    finite are left out.
    """
    finite = np.isfinite(curve.values)
    steps, values = curve.steps[finite], curve.values[finite]
    if len(steps) < 2:
        return Curve(steps, values)
    decays = np.exp(-np.diff(steps) / (share * (steps[-1] - steps[0])))
    total, weight, means = values[0], 1.0, [values[0]]
    for value, decay in zip(values[1:].tolist(), decays.tolist()):
        total, weight = total * decay + value, weight * decay + 1.0
        means.append(total / weight)
    return Curve(steps, np.array(means))


def thin(curve: Curve, most: int = MAX_POINTS) -> Curve:
    """The first and last point and the least and greatest value of even parts of the rest: at most `most` points."""
    count = len(curve.steps)
    if count <= most:
        return curve
    kept = {0, count - 1}
    for part in np.array_split(np.arange(1, count - 1), (most - 2) // 2):
        values = np.nan_to_num(curve.values[part], nan=0.0)
        kept |= {int(part[values.argmin()]), int(part[values.argmax()])}
    places = np.array(sorted(kept))
    return Curve(curve.steps[places], curve.values[places])
