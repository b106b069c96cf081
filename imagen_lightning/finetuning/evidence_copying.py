"""Copying: whether drawn images lie nearer to the training images than held-out images do.

Two distances from an image x to the training images t_1, t_2, … in order of nearness are looked at: |x - t_1| itself,
and the ratio |x - t_1| / mean |x - t_k| over the nearest 50 (the adaptive distance of Carlini et al. 2023, arXiv
2301.13188, section 5.1). A near copy is near by both: blurred pictures lie near to everything by the first alone, and
pictures unlike any training image may have one that is least unlike by the second alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from imagen_lightning.catalog import AT_LEAST_WILSON, BOTH_SETS
from imagen_lightning.errors import InputError
from imagen_lightning.metrics.confidence import wilson
from imagen_lightning.metrics.protocol import Protocol, Value
from imagen_lightning.metrics.values import share_value

NUM_NEIGHBOURS = 50
NEAR = 0.05  # a sample is near where only this share of held-out images is as near
MIN_HELD_OUT = 20  # fewer have no such share
NEAR_COPIES = "near copies"
NEAR_BY_DISTANCE = "near by distance"
NEARER = "nearer than a held-out image"
AUTHENTICITY = "authenticity"
_NUM_RESAMPLES = 1000
_AT_ONCE = 50  # resamples in memory
_BLOCK = 256  # rows of a distance matrix in memory at once


@dataclass(frozen=True)
class Neighbours:
    """The nearest training images of N images.

    Attributes:
        numbers: (N,) of the nearest training image.
        distances: (N,) float64 to it.
        ratios: (N,) float64, that distance over the mean of those to the nearest 50 (or as many as there are).
    """

    numbers: Tensor
    distances: Tensor
    ratios: Tensor


def neighbours(images: Tensor, training: Tensor, *, mirrored: Tensor | None = None) -> Neighbours:
    """Nearest by Euclidean distance, in float64.

    Args:
        images: (N, D) features or pixels.
        training: (M, D), M at least 2.
        mirrored: (N, D) of the same images mirrored, where a mirrored copy is one too; the nearer of the two counts.

    Raises:
        InputError: fewer than two training images.
        ValueError: vectors that do not fit.
    """
    _check(images, training, mirrored)
    views = [images] if mirrored is None else [images, mirrored]
    best: Neighbours | None = None
    for view in views:
        parts = [_nearest(rows, training) for rows in view.split(_BLOCK)]
        found = Neighbours(
            torch.cat([part.numbers for part in parts]),
            torch.cat([part.distances for part in parts]),
            torch.cat([part.ratios for part in parts]),
        )
        best = found if best is None else _nearer(best, found)
    assert best is not None
    return best


def own_distances(training: Tensor, numbers: Tensor) -> Tensor:
    """(K,) distances of the training images `numbers` (K,) to their nearest among the others, in float64."""
    _check(training, training, None)
    found = []
    for rows in numbers.split(_BLOCK):
        squares = _squared(training[rows], training)
        squares[torch.arange(len(rows)), rows] = math.inf
        found.append(_exact(training[rows], training, squares.argmin(dim=1)))
    return torch.cat(found)


def authentic(found: Neighbours, training: Tensor) -> Tensor:
    """(N,) bool: which images are farther from their nearest training image than that is from its own nearest.

    Alaa et al. 2022, arXiv 2102.08921, section 4.3: an image that is not is taken for a noisy copy of it.
    """
    numbers, places = found.numbers.unique(return_inverse=True)
    return found.distances > own_distances(training, numbers)[places]


def copying_values(
    samples: Neighbours, held_out: Neighbours, training: Tensor, protocol: Protocol, seed: int = 0
) -> list[Value]:
    """How near samples lie to the training images, beside held-out images; each number with its interval.

    "near by distance": the share of samples nearer than all but 5% of held-out images, 5% where samples lie as held-out
    images do. "near copies": the share that are so by distance and by ratio, at most 5% likewise. "nearer than a
    held-out image": the probability that a sample lies nearer, by distance, than a held-out image, 50% likewise.
    "authenticity": the share that are no noisy copies.

    Args:
        samples: of drawn images.
        held_out: of held-out images, at least 20.
        training: (M, D) the training images' vectors.
        protocol: how the samples were made, and the space.
        seed: of the bootstrap.

    Raises:
        InputError: fewer held-out images.
    """
    if len(held_out.distances) < MIN_HELD_OUT:
        raise InputError(
            f"copying is told by at least {MIN_HELD_OUT} held-out images, not {len(held_out.distances)}; raise --num"
        )
    few = min(NUM_NEIGHBOURS, len(training))
    known = f"of {len(training)} training images, beside {len(held_out.distances)} held out"
    both = f"ratio to the mean of the nearest {few}, {known}"
    statistics: tuple[tuple[str, Callable[[Tensor, Tensor], Tensor], str], ...] = (
        (NEAR_COPIES, near_copies, both), (NEAR_BY_DISTANCE, near_share, known), (NEARER, nearer_probability, known)
    )  # fmt: skip
    pairs = [torch.stack([found.distances, found.ratios], dim=-1) for found in (samples, held_out)]
    alone = [found.distances for found in (samples, held_out)]
    values = []
    for metric, statistic, words in statistics:
        x, y = pairs if metric == NEAR_COPIES else alone
        made = replace(protocol, metric=metric, num_samples=len(x), settings=words)
        if metric == NEARER:
            values.append(Value(metric, float(statistic(x, y)), *_interval(x, y, statistic, seed), made, BOTH_SETS))
        else:
            values.append(_share(x, y, statistic, made, seed))
    made = replace(protocol, settings=f"of {len(training)} training images")
    values.append(share_value(AUTHENTICITY, authentic(samples, training), made))
    return values


def near_copies(samples: Tensor, held_out: Tensor) -> Tensor:
    """(…) the share of samples (…, N, K) of which all K numbers lie below the 5% quantiles of (…, M, K)."""
    return (samples < held_out.quantile(NEAR, dim=-2, keepdim=True)).all(dim=-1).double().mean(dim=-1)


def near_everywhere(samples: Sequence[Neighbours], held_out: Sequence[Neighbours], protocol: Protocol) -> Value:
    """The share of samples that are near copies of the same training image in every space.

    A copy is; a picture that is grey all over may be near to a grey one in pixels alone.

    Args:
        samples, held_out: by space.
        protocol: how the samples were made.
    """

    def stacked(found: Sequence[Neighbours]) -> Tensor:
        return torch.cat([torch.stack([own.distances, own.ratios], dim=-1) for own in found], dim=-1)

    same = torch.stack([own.numbers for own in samples]).eq(samples[0].numbers).all(dim=0)
    x = torch.where(same[:, None], stacked(samples), math.inf)
    y = stacked(held_out)
    made = replace(protocol, metric=NEAR_COPIES, num_samples=len(x), settings=f"beside {len(y)} held out")
    return _share(x, y, near_copies, made, 0)


def near_share(samples: Tensor, held_out: Tensor) -> Tensor:
    """(…) the share of samples (…, N) below the 5% quantile of held-out images (…, M)."""
    return (samples < held_out.quantile(NEAR, dim=-1, keepdim=True)).double().mean(dim=-1)


def nearer_probability(samples: Tensor, held_out: Tensor) -> Tensor:
    """(…) P(sample < held-out) + P(equal) / 2, of distances (…, N) and (…, M)."""
    ordered = held_out.sort(dim=-1).values.contiguous()
    below, through = (torch.searchsorted(ordered, samples, right=right) for right in (False, True))
    return 1 - (below + through).double().mean(dim=-1) / (2 * ordered.shape[-1])


def data_copying_z(samples: Tensor, held_out: Tensor) -> float:
    """The Mann-Whitney z of both sets' distances (N,), (M,); far below 0 where samples lie nearer.

    C_T of Meehan et al. 2020, arXiv 2004.05675, eq. 3, over the whole space as one cell.
    """
    n, m = len(samples), len(held_out)
    return (0.5 - float(nearer_probability(samples, held_out))) * math.sqrt(12 * n * m / (n + m + 1))


# ---- parts


def _check(images: Tensor, training: Tensor, mirrored: Tensor | None) -> None:
    if images.ndim != 2 or training.ndim != 2 or images.shape[1] != training.shape[1]:
        raise ValueError(f"vectors {tuple(images.shape)} and {tuple(training.shape)} have no distance")
    if mirrored is not None and mirrored.shape != images.shape:
        raise ValueError(f"{tuple(mirrored.shape)} mirrored vectors of {tuple(images.shape)}")
    if len(training) < 2:
        raise InputError(f"copying is told by at least 2 training images, not {len(training)}")


def _nearest(images: Tensor, training: Tensor) -> Neighbours:
    few = min(NUM_NEIGHBOURS, len(training))
    squares, numbers = _squared(images, training).topk(few, dim=1, largest=False)
    distances = _exact(images, training, numbers[:, 0])
    # The nearest one's is found exactly: rounding of the product would hide that a copy's distance is 0.
    mean = (squares[:, 1:].sqrt().sum(dim=1) + distances) / few
    ratios = torch.where(mean > 0, distances / mean, torch.zeros_like(mean))
    return Neighbours(numbers[:, 0], distances, ratios)


def _nearer(first: Neighbours, second: Neighbours) -> Neighbours:
    swap = second.distances < first.distances
    return Neighbours(
        torch.where(swap, second.numbers, first.numbers),
        torch.where(swap, second.distances, first.distances),
        torch.where(swap, second.ratios, first.ratios),
    )


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """(N, M) squared distances of (N, D) and (M, D), block by block of the second."""
    x = x.double()
    origin = x.mean(dim=0)  # less of float64 is spent on what is common
    x = x - origin
    lengths = x.square().sum(dim=1, keepdim=True)
    return torch.cat([_product(x, lengths, rows.double() - origin) for rows in y.split(8 * _BLOCK)], dim=1)


def _product(x: Tensor, lengths: Tensor, y: Tensor) -> Tensor:
    return (lengths + y.square().sum(dim=1) - 2 * x @ y.T).clamp(min=0)


def _exact(images: Tensor, training: Tensor, numbers: Tensor) -> Tensor:
    return (images.double() - training[numbers].double()).norm(dim=1)


def _share(
    samples: Tensor, held_out: Tensor, statistic: Callable[[Tensor, Tensor], Tensor], protocol: Protocol, seed: int
) -> Value:
    """A share with its interval; Wilson's where it is wider: where no sample is near, no resample has one."""
    share = float(statistic(samples, held_out))
    low, high = _interval(samples, held_out, statistic, seed)
    narrow = wilson(round(share * len(samples)), len(samples))
    return Value(protocol.metric, share, min(low, narrow[0]), max(high, narrow[1]), protocol, AT_LEAST_WILSON)


def _interval(
    samples: Tensor, held_out: Tensor, statistic: Callable[[Tensor, Tensor], Tensor], seed: int
) -> tuple[float, float]:
    """95% of a statistic of two sets, by resampling both (Efron 1979)."""
    generator = torch.Generator().manual_seed(seed)

    def resampled(values: Tensor) -> Tensor:
        return values[torch.randint(len(values), (_AT_ONCE, len(values)), generator=generator)]

    parts = [statistic(resampled(samples), resampled(held_out)) for _ in range(_NUM_RESAMPLES // _AT_ONCE)]
    found = torch.cat(parts).sort().values
    tail = math.floor(0.025 * (_NUM_RESAMPLES - 1))
    return float(found[tail]), float(found[_NUM_RESAMPLES - 1 - tail])
