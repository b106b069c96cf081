"""Who sees which sample when.

A run consumes positions 0, 1, 2, … One integer says where it is: position p is sample p % n of epoch p // n, whatever
the number of processes, workers or prefetched batches. Training batches run across the end of an epoch.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from imagen_lightning.types import InputError

_CACHED_WINDOWS = 4


def _check_places(start: int, stop: int, length: int) -> None:
    if not 0 <= start <= stop <= length:
        raise IndexError(f"places {start}..{stop} are not within an epoch of {length} samples")


def _tuples(pairs: np.ndarray) -> list[tuple[int, int]]:
    return [(shard, sample) for shard, sample in pairs.tolist()]


class SampleOrder:
    """The order in which a run sees the samples of a set of shards: a pure function of its arguments.

    Each epoch shuffles the shards, cuts them into windows of `window` shards, and shuffles the samples within each
    window, so that reading stays sequential by shards. Every sample comes once an epoch.

    Args:
        samples_per_shard: number of samples of each shard.
        seed: non-negative; another seed is another order.
        global_batch_size: samples of one batch over all processes.
        window: shards whose samples are shuffled together; memory is one integer a sample of a window.

    Raises:
        InputError: no samples, or a value out of range.
    """

    def __init__(self, samples_per_shard: Sequence[int], seed: int, global_batch_size: int, window: int) -> None:
        if sum(samples_per_shard) == 0:
            raise InputError(f"{len(samples_per_shard)} shards hold no usable sample; check the shards")
        if seed < 0 or global_batch_size < 1 or window < 1:
            raise InputError(
                f"seed {seed}, batch size {global_batch_size}, window {window}: the seed must be at least 0, "
                "the others at least 1"
            )
        self.samples_per_shard = list(samples_per_shard)
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.window = window
        self._sizes = np.asarray(samples_per_shard, dtype=np.int64)
        self._length = int(self._sizes.sum())
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._last = 0, np.empty((0, 2), dtype=np.int64)  # the window of the last look-up, and where it begins

    def __len__(self) -> int:
        """Samples of one epoch."""
        return self._length

    def pairs(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, 2) int64: shard and sample at each of these positions of the run, over any epochs."""
        parts = [np.empty((0, 2), dtype=np.int64)]
        while start < stop:
            begin, window = self._at(start)
            parts.append(window[start - begin : stop - begin])
            start = begin + len(window)
        return np.concatenate(parts)

    def positions(self, epoch: int, start: int, stop: int) -> list[tuple[int, int]]:
        """Returns the (shard, sample) pairs of places start..stop-1 of an epoch."""
        _check_places(start, stop, len(self))
        begin = epoch * len(self)
        return _tuples(self.pairs(begin + start, begin + stop))

    def at(self, position: int) -> tuple[int, int]:
        """The (shard, sample) pair at a position of the run."""
        begin, window = self._at(position)
        shard, sample = window[position - begin].tolist()
        return shard, sample

    def batch(self, position: int) -> list[tuple[int, int]]:
        """The pairs of the global batch that begins at a position; it runs across the end of an epoch."""
        return _tuples(self.pairs(position, position + self.global_batch_size))

    def replacement(self, position: int, attempt: int) -> tuple[int, int]:
        """The pair that stands in where the sample at `position` cannot be used: one of the same window, drawn by
        (seed, position, attempt)."""
        _, window = self._at(position)
        number = np.random.default_rng([self.seed, position, attempt, 1]).integers(len(window))
        shard, sample = window[number].tolist()
        return shard, sample

    def window_number(self, position: int) -> tuple[int, int]:
        """The epoch and the number within it of the window at a position; one without samples has no position."""
        epoch, place = divmod(position, self._length)
        return epoch, int(np.searchsorted(self._epoch(epoch)[1], place, side="right"))

    def window_shards(self, epoch: int, number: int) -> list[int]:
        """The shards of a window, in the epoch's order; numbers past the last go on in the next epoch."""
        per_epoch = -(-len(self._sizes) // self.window)
        epoch, number = epoch + number // per_epoch, number % per_epoch
        return self._epoch(epoch)[0][number * self.window : (number + 1) * self.window].tolist()

    def shards_at(self, position: int) -> list[int]:
        """The shards of the window at a position, then those of the next: what is read from here on."""
        epoch, number = self.window_number(position)
        return list(dict.fromkeys(self.window_shards(epoch, number) + self.window_shards(epoch, number + 1)))

    def _at(self, position: int) -> tuple[int, np.ndarray]:
        """The position at which the window of a position begins, and the window's pairs."""
        begin, window = self._last
        if not begin <= position < begin + len(window):
            epoch, number = self.window_number(position)
            ends = self._epoch(epoch)[1]
            window = self._window(epoch, number)
            begin = epoch * self._length + int(ends[number]) - len(window)
            self._last = begin, window
        return begin, window

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shards in order, and the place at which each of its windows ends."""
        if epoch not in self._epochs:
            # SeedSequence pads with zeros: the third word is 0 here and at least 1 for a window
            shards = np.random.default_rng([self.seed, epoch, 0]).permutation(len(self._sizes))
            sizes = np.add.reduceat(self._sizes[shards], np.arange(0, len(shards), self.window))
            self._epochs[epoch] = shards, np.cumsum(sizes)
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _window(self, epoch: int, number: int) -> np.ndarray:
        """(n, 2) pairs of one window, shuffled."""
        if (epoch, number) not in self._windows:
            shards = self._epoch(epoch)[0][number * self.window : (number + 1) * self.window]
            sizes = self._sizes[shards]
            sample = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            shuffled = np.random.default_rng([self.seed, epoch, number + 1]).permutation(len(sample))
            self._windows[epoch, number] = np.stack([np.repeat(shards, sizes), sample], axis=1)[shuffled]
            if len(self._windows) > _CACHED_WINDOWS:
                self._windows.popitem(last=False)
        return self._windows[epoch, number]


class BucketedOrder:
    """The order in which a run sees samples in buckets, such as of one aspect, each global batch of one bucket.

    A pure function of its arguments, with the methods of `SampleOrder`. Each bucket has a `SampleOrder` of its own over
    the same shards, so that all of them advance through the same windows; a bucket's batches run across the end of its
    epochs, in each of which each of its samples comes once. Batch j of a bucket of n samples is due when the whole of
    it has been seen for (j + 1) B / n epochs, B samples a batch; the run takes the batches as they are due, those of
    one time by number of bucket. So all buckets are at the same epoch, to a batch, and the run's epoch of all samples
    differs from its buckets' by less than a batch of each.

    Args:
        buckets: of each shard, the bucket's number of each of its samples, (n,) of an unsigned integer type.
        seed, global_batch_size, window: see `SampleOrder`.

    Raises:
        InputError: see `SampleOrder`.
    """

    def __init__(self, buckets: Sequence[np.ndarray], seed: int, global_batch_size: int, window: int) -> None:
        counts = [np.bincount(numbers, minlength=1) for numbers in buckets]
        table = np.zeros((len(counts), max((len(item) for item in counts), default=1)), dtype=np.int64)
        for shard, item in enumerate(counts):
            table[shard, : len(item)] = item
        self.buckets = list(buckets)
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.window = window
        self._whole = SampleOrder(table.sum(axis=1).tolist(), seed, global_batch_size, window)
        self._numbers = np.flatnonzero(table.sum(axis=0)).tolist()
        self._orders = [SampleOrder(table[:, n].tolist(), seed, global_batch_size, window) for n in self._numbers]
        sizes = [len(order) for order in self._orders]
        common = math.lcm(*sizes)
        self._intervals = [common // size for size in sizes]  # between two batches of a bucket, in exact units of time
        self._samples: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._last = -1, (0, 0)  # the last batch looked up, and what it is

    def __len__(self) -> int:
        """Samples of one epoch."""
        return len(self._whole)

    def digest(self) -> str:
        """12 hexadecimal digits of which sample is in which bucket."""
        whole = hashlib.sha256()
        for numbers in self.buckets:
            whole.update(len(numbers).to_bytes(8, "little") + numbers.astype("<u4").tobytes())
        return whole.hexdigest()[:12]

    def bucket(self, position: int) -> int:
        """The number of the bucket of the batch that a position lies in."""
        return self._numbers[self._batch(position // self.global_batch_size)[0]]

    def pairs(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, 2) int64: shard and sample at each of these positions of the run."""
        size, parts = self.global_batch_size, [np.empty((0, 2), dtype=np.int64)]
        while start < stop:
            end = min(stop, (start // size + 1) * size)
            which, inner = self._inner(start)
            within = self._orders[which].pairs(inner, inner + end - start)
            rows = [self._sample(which, shard, number) for shard, number in within.tolist()]
            parts.append(np.stack([within[:, 0], rows], axis=1))
            start = end
        return np.concatenate(parts)

    def positions(self, epoch: int, start: int, stop: int) -> list[tuple[int, int]]:
        """The (shard, sample) pairs of places start..stop-1 of the positions from epoch times the number of samples."""
        _check_places(start, stop, len(self))
        begin = epoch * len(self)
        return _tuples(self.pairs(begin + start, begin + stop))

    def at(self, position: int) -> tuple[int, int]:
        """The (shard, sample) pair at a position of the run."""
        which, inner = self._inner(position)
        shard, number = self._orders[which].at(inner)
        return shard, self._sample(which, shard, number)

    def batch(self, position: int) -> list[tuple[int, int]]:
        """The pairs of the global batch that begins at a position, a multiple of its size."""
        return _tuples(self.pairs(position, position + self.global_batch_size))

    def replacement(self, position: int, attempt: int) -> tuple[int, int]:
        """The pair that stands in where the sample at `position` cannot be used: of the same bucket and window."""
        which, inner = self._inner(position)
        shard, number = self._orders[which].replacement(inner, attempt)
        return shard, self._sample(which, shard, number)

    def window_shards(self, epoch: int, number: int) -> list[int]:
        """See `SampleOrder`: the same for all buckets."""
        return self._whole.window_shards(epoch, number)

    def shards_at(self, position: int) -> list[int]:
        """The shards of the window that the bucket at a position is in, then those of the next."""
        which, inner = self._inner(position)
        return self._orders[which].shards_at(inner)

    def _inner(self, position: int) -> tuple[int, int]:
        """Which of the buckets that have samples a position is of, and its number among the bucket's positions."""
        batch, place = divmod(position, self.global_batch_size)
        which, number = self._batch(batch)
        return which, number * self.global_batch_size + place

    def _batch(self, batch: int) -> tuple[int, int]:
        """Which of the buckets that have samples a batch of the run is of, and its number among the bucket's."""
        if self._last[0] != batch:
            # All batches due by this time are fewer than `batch`, and at most two a bucket short of it.
            time = max(0, batch - len(self._orders))
            taken = [time * len(order) // len(self) for order in self._orders]
            for _ in range(batch - sum(taken) + 1):
                which = min(range(len(taken)), key=lambda n: ((taken[n] + 1) * self._intervals[n], n))
                taken[which] += 1
            self._last = batch, (which, taken[which] - 1)
        return self._last[1]

    def _sample(self, which: int, shard: int, number: int) -> int:
        """The sample of a shard that is the number-th of a bucket's."""
        if (which, shard) not in self._samples:
            self._samples[which, shard] = np.flatnonzero(self.buckets[shard] == self._numbers[which])
            if len(self._samples) > 4 * self.window * len(self._orders):
                self._samples.popitem(last=False)
        return int(self._samples[which, shard][number])


class PositionBatchSampler:
    """Yields one process's share of the positions of each global batch, as a DataLoader's `batch_sampler`.

    Args:
        start: the first position; a function is asked each time that an iteration begins.
        global_batch_size: samples of one batch over all processes.
        rank: this process's number; it takes the rank-th part of each batch.
        world_size: number of processes.
        stop: the position to end before, with a short last batch; None never ends.

    Raises:
        InputError: the global batch does not divide by the number of processes.
    """

    def __init__(
        self,
        start: int | Callable[[], int],
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        stop: int | None = None,
    ) -> None:
        if global_batch_size < 1 or global_batch_size % world_size:
            raise InputError(
                f"batch_size {global_batch_size} is the number of samples over all {world_size} processes and must be "
                f"a positive multiple of it; nearest: {max(1, round(global_batch_size / world_size)) * world_size}"
            )
        self.start = start
        self.global_batch_size = global_batch_size
        self.rank = rank
        self.world_size = world_size
        self.stop = stop

    def __iter__(self) -> Iterator[list[int]]:
        position = self.start() if callable(self.start) else self.start
        while self.stop is None or position < self.stop:
            positions = self._share(position)
            if positions:
                yield positions
            position += self.global_batch_size

    def __len__(self) -> int:
        if self.stop is None or callable(self.start):
            raise TypeError("an endless sampler has no length")
        return sum(bool(self._share(p)) for p in range(self.start, self.stop, self.global_batch_size))

    def _share(self, position: int) -> list[int]:
        size = self.global_batch_size if self.stop is None else min(self.global_batch_size, self.stop - position)
        begin, end = (size * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return list(range(position + begin, position + end))
