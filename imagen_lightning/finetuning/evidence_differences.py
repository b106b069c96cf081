"""What changed between two cascades that drew the same captions from the same noise: differences, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from imagen_lightning.catalog import higher_is_better, is_deviation, is_percent
from imagen_lightning.evaluation.measures import CAPTION_ACCURACY, Measured
from imagen_lightning.files import plain
from imagen_lightning.metrics.confidence import bootstrap_mean, wilson
from imagen_lightning.metrics.frechet import FeatureMoments, frechet_influence
from imagen_lightning.metrics.protocol import Value

PAIRED = "95% paired bootstrap"
PAIRED_SHARES = "95% Newcombe, paired"
QUADRATURE = "both intervals in quadrature"
SMALL_POINTS, SMALL_FRACTION = 0.05, 0.1  # differences within which two values are alike, see `reading`


@dataclass(frozen=True)
class Difference:
    """A metric after fine-tuning less the same before.

    Attributes:
        metric: its name.
        before, after: the values.
        value: after - before.
        low, high: its interval; None where none is known.
        confidence: what the interval is.
    """

    metric: str
    before: float
    after: float
    value: float
    low: float | None
    high: float | None
    confidence: str | None

    @property
    def verdict(self) -> str:
        """See `reading`."""
        return reading(self.metric, self.low, self.high, self.before)

    def to_json(self) -> dict[str, Any]:
        return dict(plain({**vars(self), "verdict": self.verdict}))


def reading(metric: str, low: float | None, high: float | None, before: float) -> str:
    """Return what the interval of a difference says of a metric.

    "better" or "worse" where it excludes 0, "alike" where all of it is small (5 points of a metric in percent, 10% of
    the value before of others), and "unclear" where it holds 0 and large differences too, where it is not known, or
    where the metric has no direction.
    """
    better = higher_is_better(metric)
    if low is None or high is None or better is None:
        return "unclear"
    if low > 0 or high < 0:
        return "better" if (low > 0) == better else "worse"
    small = SMALL_POINTS if is_percent(metric) else SMALL_FRACTION * abs(before)
    return "alike" if max(-low, high) <= small else "unclear"


def differences(
    before: Measured, after: Measured, features: Mapping[str, tuple[Tensor, Tensor, Tensor]] | None = None
) -> list[Difference]:
    """Of all metrics that both have, in their order.

    Args:
        before, after: of the same captions and noise.
        features: by the name of a Fréchet distance (N, D) features before and after, and (M, D) of the real images.
    """
    features = features or {}
    found = []
    for old in before.values:
        if not after.has(old.metric):
            continue
        new = after.value(old.metric)
        pairs = before.per_image.get(old.metric), after.per_image.get(old.metric)
        if old.metric == CAPTION_ACCURACY and pairs[0] is not None and pairs[1] is not None:
            low, high = paired_shares(pairs[0] > 0.5, pairs[1] > 0.5)
            found.append(_made(old, new, low, high, PAIRED_SHARES))
        elif pairs[0] is not None and pairs[1] is not None and len(pairs[0]) > 1:
            found.append(_made(old, new, *bootstrap_mean(pairs[1] - pairs[0]), PAIRED))
        elif old.metric in features:
            low, high = frechet_difference(old.value, new.value, *features[old.metric])
            found.append(_made(old, new, low, high, PAIRED))
        else:
            found.append(_quadrature(old, new))
    return found


def paired_shares(before: Tensor, after: Tensor) -> tuple[float, float]:
    """95% interval of the difference of two shares of the same N trials, (N,) bool each; low and high.

    Newcombe 1998 (Statistics in Medicine 17, 2635-2650), method 10: Wilson's intervals of both, joined by their
    correlation. It has a width also where no trial changed, unlike a bootstrap.
    """
    n = len(before)
    both, only_after = int((before & after).sum()), int((after & ~before).sum())
    only_before = int((before & ~after).sum())
    neither = n - both - only_after - only_before
    p, q = (both + only_after) / n, (both + only_before) / n
    (p_low, p_high), (q_low, q_high) = wilson(both + only_after, n), wilson(both + only_before, n)
    product = (both + only_after) * (only_before + neither) * (both + only_before) * (only_after + neither)
    phi = 0.0
    if product:
        cross = both * neither - only_after * only_before
        phi = (max(cross - n / 2, 0.0) if cross > 0 else cross) / math.sqrt(product)
    below = _joined(p - p_low, q_high - q, phi)
    above = _joined(p_high - p, q - q_low, phi)
    return p - q - below, p - q + above


def _joined(first: float, second: float, phi: float) -> float:
    return math.sqrt(max(first**2 - 2 * phi * first * second + second**2, 0.0))


def frechet_difference(
    before: float, after: float, before_features: Tensor, after_features: Tensor, reference: Tensor
) -> tuple[float, float]:
    """95% interval of the difference of two Fréchet distances from one reference, low and high.

    The bootstrap over captions of the difference of both distances' first-order changes (`frechet_influence`), in
    pairs: image i of both sets has the same caption and noise. The reference is held fixed.

    Args:
        before, after: the distances.
        before_features, after_features: (N, D) each.
        reference: (M, D).
    """
    moments = FeatureMoments.of(reference)
    pulls = frechet_influence(after_features, moments) - frechet_influence(before_features, moments)
    low, high = bootstrap_mean(pulls)
    return after - before + low, after - before + high


def _made(old: Value, new: Value, low: float | None, high: float | None, confidence: str | None) -> Difference:
    return Difference(old.metric, old.value, new.value, new.value - old.value, low, high, confidence)


def _quadrature(old: Value, new: Value) -> Difference:
    """Wider than need be, since it leaves aside that both drew the same captions from the same noise."""
    if old.low is None or old.high is None or new.low is None or new.high is None:
        return _made(old, new, None, None, None)
    value = new.value - old.value
    if not math.isfinite(value):
        return _made(old, new, None, None, None)
    below = math.hypot(new.value - new.low, old.high - old.value)
    above = math.hypot(new.high - new.value, old.value - old.low)
    scale = 1.96 if is_deviation(old.confidence) else 1.0  # a standard deviation is no 95%
    return _made(old, new, value - scale * below, value + scale * above, QUADRATURE)
