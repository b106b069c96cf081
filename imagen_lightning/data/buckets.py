"""Buckets of sizes for training without cropping to squares: which there are, and which sample goes into which.

Every size has about as many pixels as the square, so that batches take the same time and memory, and sides that are
multiples of a step, so that networks that halve them, and super-resolution that divides them, can take them. A sample
goes where its aspect is nearest, which leaves the least to crop.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from imagen_lightning.data.decode import size_from_header
from imagen_lightning.data.metadata import column_files, read_columns
from imagen_lightning.data.order import BucketedOrder
from imagen_lightning.data.shards import IMAGE, METADATA, Shards
from imagen_lightning.data.skips import Unusable
from imagen_lightning.types import InputError

log = logging.getLogger(__name__)

MAX_ASPECT = 2
AREA_TOLERANCE = 0.1
_STEPS = 8  # of a side, by default
_MAX_STEPS = 16
_HEADER = 2**14  # bytes of an image file that are read for its size


def bucket_sizes(image_size: int, step: int | None = None) -> list[tuple[int, int]]:
    """(height, width) of each bucket, from the tallest to the widest.

    All sides that are multiples of `step`, from 1:2 to 2:1, of an area within a tenth of the square's.

    Args:
        image_size: side of the square in pixels.
        step: in pixels, a divisor of image_size, at least a sixteenth of it; None takes an eighth.

    Raises:
        InputError: step is none of these.
    """
    if step is None and image_size % _STEPS:
        raise InputError(f"image_size {image_size} does not divide by {_STEPS}; give bucket_step, a divisor of it")
    step = image_size // _STEPS if step is None else step
    if step < 1 or image_size % step or image_size > _MAX_STEPS * step:
        raise InputError(
            f"bucket_step {step} must divide image_size {image_size} and be at least a sixteenth of it; "
            f"{max(image_size // _STEPS, 1)} is usual"
        )
    sides = range(step, MAX_ASPECT * image_size + 1, step)
    sizes = [
        (height, width)
        for height in sides
        for width in sides
        if max(height, width) <= MAX_ASPECT * min(height, width)
        and abs(height * width / image_size**2 - 1) <= AREA_TOLERANCE
    ]
    return sorted(sizes, key=lambda size: (size[1] / size[0], size))


def nearest_buckets(widths: np.ndarray, heights: np.ndarray, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    """The number of the bucket of nearest aspect to each image, (n,) uint8; the square one's where a size is unknown.

    Args:
        widths: (n,) in pixels, NaN where unknown.
        heights: likewise.
        sizes: see `bucket_sizes`.
    """
    aspects = np.log([width / height for height, width in sizes])
    wanted = np.nan_to_num(np.log(np.asarray(widths, float) / np.asarray(heights, float)))
    return np.abs(wanted[:, None] - aspects).argmin(axis=1).astype(np.uint8)


def merge_small(
    buckets: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]], min_samples: int
) -> tuple[list[np.ndarray], list[int]]:
    """Moves the samples of buckets with fewer than min_samples to their neighbour in aspect, the fewest first.

    Returns:
        The buckets' numbers as they are then, and the number of samples in each bucket.
    """
    counts = np.sum([np.bincount(numbers, minlength=len(sizes)) for numbers in buckets], axis=0).astype(np.int64)
    aspects = np.log([width / height for height, width in sizes])
    new = np.arange(len(sizes), dtype=np.uint8)
    while (counts > 0).sum() > 1:
        least = int(np.where(counts > 0, counts, np.iinfo(np.int64).max).argmin())
        if counts[least] >= min_samples:
            break
        distance = np.where(counts > 0, np.abs(aspects - aspects[least]), np.inf)
        distance[least] = np.inf
        into = int(distance.argmin())
        counts[into] += counts[least]
        counts[least] = 0
        new[new == least] = into
    return [new[numbers] for numbers in buckets], counts.tolist()


def read_sizes(
    shards: Shards, shard: int, rows: np.ndarray, beside: Path, cache: Path
) -> tuple[np.ndarray, np.ndarray]:
    """(n,) widths and heights of a shard's images, NaN where unknown: from the metadata, else from the files' headers.

    Args:
        shards: the indexed shards.
        shard: which of them.
        rows: (n,) of the samples.
        beside: a path of the shard, where files that belong to it lie or may be put.
        cache: the folder where the metadata is kept if it cannot be kept there.
    """
    columns = read_columns(
        beside,
        shards.indexes[shard].keys,
        partial(shards.read, shard, kind=METADATA),
        column_files(beside, cache),
    )
    unknown = np.full(shards.indexes[shard].num_samples, np.nan)
    widths, heights = (columns.get(name, unknown)[rows].copy() for name in ("width", "height"))
    for number in np.flatnonzero(np.isnan(widths) | np.isnan(heights)).tolist():
        widths[number], heights[number] = _header_size(shards, shard, int(rows[number]))
    return widths, heights


def _header_size(shards: Shards, shard: int, row: int) -> tuple[float, float]:
    for most in (_HEADER, None):  # profiles and previews may put the size far into a file
        with contextlib.suppress(Unusable):  # met again, and counted, when it is its turn
            return size_from_header(shards.read(shard, row, IMAGE, most) or b"")
    return np.nan, np.nan


def bucketed_order(
    shards: Shards,
    rows: Sequence[np.ndarray],
    sizes: Sequence[tuple[int, int]],
    seed: int,
    global_batch_size: int,
    window: int,
    cache: Path,
) -> BucketedOrder:
    """The order over the rows that may be used, by the sizes of their images; buckets of less than a batch are merged.

    Raises:
        InputError: no rows.
    """
    buckets = [
        nearest_buckets(*read_sizes(shards, shard, numbers, beside, cache), sizes)
        for shard, (numbers, beside) in enumerate(zip(rows, shards.paths_beside()))
    ]
    merged, counts = merge_small(buckets, sizes, global_batch_size)
    parts = [f"{count} of {height} x {width}" for (height, width), count in zip(sizes, counts) if count]
    log.info("buckets (height x width): %s", ", ".join(parts))
    return BucketedOrder(merged, seed, global_batch_size, window)
