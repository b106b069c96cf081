"""Intervals beside every number: bootstrap of means, Wilson's of shares, and of the Fréchet distance."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

from imagen_lightning.errors import InputError
from imagen_lightning.metrics.frechet import FeatureMoments, frechet_influence

_DRAWS = 1 << 22  # random numbers in memory at once


def bootstrap_mean(
    numbers: Tensor, *, level: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of N numbers (Efron 1979), low and high.

    Args:
        numbers: (N,), N at least 2; infinite ones, such as the PSNR of equal pictures, count as such.
        level: of confidence.
        num_resamples: with replacement, the same for a seed and N.
        seed: of the resamples.

    Raises:
        InputError: fewer than two numbers, NaN among them, a level outside of (0, 1).
    """
    values = numbers.detach().double().cpu().flatten()
    _check(len(values), level)
    if values.isnan().any():
        raise InputError(f"{int(values.isnan().sum())} of {len(values)} numbers are NaN and have no interval")
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, _DRAWS // len(values))
    means = []
    for start in range(0, num_resamples, chunk):
        shape = (min(chunk, num_resamples - start), len(values))
        means.append(values[torch.randint(len(values), shape, generator=generator)].mean(dim=1))
    ordered = torch.cat(means).sort().values
    # Order statistics, not interpolated: between infinite ones interpolation gives NaN.
    tail = (1 - level) / 2
    low = math.floor(tail * (num_resamples - 1))
    return float(ordered[low]), float(ordered[num_resamples - 1 - low])


def wilson(successes: float, count: int, *, level: float = 0.95) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927), low and high in [0, 1]; honest also for shares of 0 and 1.

    Raises:
        InputError: no trials, successes outside of 0..count, a level outside of (0, 1).
    """
    if count < 1 or not 0 <= successes <= count:
        raise InputError(f"a share of {successes} among {count} has no interval")
    _check(2, level)
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_frechet(
    distance: float,
    features: Tensor,
    reference: FeatureMoments,
    *,
    level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of a Fréchet distance over draws of as many pictures, the reference fixed, low and high.

    The bootstrap of the distance's first-order change (`frechet_influence`), which takes one eigendecomposition for all
    resamples. Its spread is that of independent draws within some percent where the distance is above its floor, and
    errs to the wide side at the floor; the distance's upward bias at few samples is not in it.

    Args:
        distance: of the features from the reference.
        features: (N, D), N at least 2.
        reference: moments of the reference.
        level: of confidence.
        num_resamples: see `bootstrap_mean`.
        seed: of the resamples.

    Raises:
        InputError: as `bootstrap_mean`.
    """
    _check(len(features), level)
    pulls = frechet_influence(features, reference)
    low, high = bootstrap_mean(pulls, level=level, num_resamples=num_resamples, seed=seed)
    return max(0.0, distance + low), distance + high


def _check(count: int, level: float) -> None:
    if count < 2:
        raise InputError(f"an interval needs at least 2 samples, not {count}; measure more")
    if not 0 < level < 1:
        raise InputError(f"a confidence level of {level} must lie between 0 and 1, such as 0.95")
