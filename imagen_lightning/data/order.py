"""Who sees which sample when.

A run consumes positions 0, 1, 2, … One integer says where it is: position p is sample p % n of epoch p // n, whatever
the number of processes, workers or prefetched batches. Training batches run across the end of an epoch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from imagen_lightning.types import InputError

_CACHED_WINDOWS = 4


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
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        """Samples of one epoch."""
        return int(self._sizes.sum())

    def positions(self, epoch: int, start: int, stop: int) -> list[tuple[int, int]]:
        """Returns the (shard, sample) pairs of places start..stop-1 of an epoch."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"places {start}..{stop} are not within an epoch of {len(self)} samples")
        _, ends = self._epoch(epoch)
        pairs: list[tuple[int, int]] = []
        while start < stop:
            number = int(np.searchsorted(ends, start, side="right"))
            begin = int(ends[number - 1]) if number else 0
            here = min(stop, int(ends[number]))
            pairs.extend((int(a), int(b)) for a, b in self._window(epoch, number)[start - begin : here - begin])
            start = here
        return pairs

    def at(self, position: int) -> tuple[int, int]:
        """The (shard, sample) pair at a position of the run."""
        epoch, place = divmod(position, len(self))
        return self.positions(epoch, place, place + 1)[0]

    def batch(self, position: int) -> list[tuple[int, int]]:
        """The pairs of the global batch that begins at a position; it runs across the end of an epoch."""
        return [self.at(p) for p in range(position, position + self.global_batch_size)]

    def replacement(self, position: int, attempt: int) -> tuple[int, int]:
        """The pair that stands in where the sample at `position` cannot be used: one of the same window, drawn by
        (seed, position, attempt)."""
        epoch, place = divmod(position, len(self))
        _, ends = self._epoch(epoch)
        pairs = self._window(epoch, int(np.searchsorted(ends, place, side="right")))
        shard, sample = pairs[np.random.default_rng([self.seed, position, attempt, 1]).integers(len(pairs))]
        return int(shard), int(sample)

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
            pairs = np.stack([np.repeat(shards, sizes), sample], axis=1)
            self._windows[epoch, number] = np.random.default_rng([self.seed, epoch, number + 1]).permutation(pairs)
            if len(self._windows) > _CACHED_WINDOWS:
                self._windows.popitem(last=False)
        return self._windows[epoch, number]


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
