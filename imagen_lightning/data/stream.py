"""Shards that cannot be indexed, read forward: commands (`pipe:`), and addresses that do not read by offset.

Shards are drawn again and again, at random and with replacement, by webdataset's `ResampledShards`; each worker of each
process draws its own. Of webdataset nothing else is used but its opening of commands: its grouping gives what a cut
left of a sample, and its decoding unpickles.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from imagen_lightning.data.braces import expand_braces
from imagen_lightning.data.dataset import Decoder, LoadedBatch, Sample, collate
from imagen_lightning.data.filters import Filter, FilterCounts
from imagen_lightning.data.metadata import parse_json
from imagen_lightning.data.remote import filesystem, is_remote
from imagen_lightning.data.shards import METADATA, list_shards
from imagen_lightning.data.skips import Reason, Skip, Unusable
from imagen_lightning.data.tape import RawSample, SampleReader
from imagen_lightning.errors import InputError

_FIRST_HELD = 100  # samples in the shuffle buffer when the first comes out; it grows from there
_MAX_FAULTS = 100  # skips without a usable sample between them, before the run is told
_MAX_REMOVED = 100_000  # likewise, samples that a filter removes


class Removed(NamedTuple):
    """A sample that a filter removed, for `reason`."""

    reason: str


@dataclass
class StreamSample(Sample):
    """A Sample, and what a filter saw since the one before."""

    filter_counts: FilterCounts = field(default_factory=FilterCounts)


@dataclass
class StreamBatch(LoadedBatch):
    """A LoadedBatch, and what a filter saw meanwhile; its positions count from 0 until the main process numbers it."""

    filter_counts: FilterCounts = field(default_factory=FilterCounts)


def collate_stream(samples: Sequence[StreamSample]) -> StreamBatch:
    """Stacks samples; those without an image are left out."""
    counts = FilterCounts()
    for sample in samples:
        counts.add(sample.filter_counts)
    return StreamBatch(**vars(collate(samples)), filter_counts=counts)


def stream_addresses(patterns: str | Path | Sequence[str | Path], allow_pipe: bool = False) -> list[str]:
    """Commands (`pipe:COMMAND`, with braces), and what `list_shards` takes, to one address a shard.

    Raises:
        InputError: a command without `allow_pipe`, or as `list_shards`.
    """
    addresses: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str | Path) else patterns:
        text = str(pattern)
        if not text.startswith("pipe:"):
            addresses.extend(found := list_shards(text))
            if is_remote(found[0]):
                filesystem(found[0])  # its package is at hand
            continue
        if not allow_pipe:
            raise InputError(
                f"shards {text!r}: a shell would run this command with your rights; where you trust whoever wrote it, "
                "set allow_pipe: true"
            )
        addresses.extend(expand_braces(text))
    if not addresses:
        raise InputError("no shards were named")
    return addresses


def shuffled(
    items: Iterable[RawSample | Skip | Removed], size: int, rng: random.Random
) -> Iterator[RawSample | Skip | Removed]:
    """Samples through a buffer of at most `size`, out of which they come at random; all else passes at once."""
    held: list[RawSample] = []
    num_given = 0
    for item in items:
        if not isinstance(item, RawSample):
            yield item
            continue
        held.append(item)
        if len(held) >= min(size, _FIRST_HELD + num_given // 2):
            place = rng.randrange(len(held))
            held[place], held[-1] = held[-1], held[place]
            num_given += 1
            yield held.pop()


class ShardStream(IterableDataset[StreamSample]):
    """Endless samples of shards drawn at random, other ones in each worker of each process.

    What comes depends on (seed, start, rank, worker), as long as no shard changes or fails.

    Args:
        shards: their addresses.
        decode: from members to a sample.
        seed: of the draws of shards, the shuffling and what `decode` draws.
        rank: this process's number.
        shuffle_buffer: samples, not yet decoded, among which the next is drawn.
        filter: conditions on the samples' json, or None.

    Attributes:
        start: the run's position when an iteration begins, so that a resumed run does not see the same again.
    """

    def __init__(
        self,
        shards: Sequence[str],
        decode: Decoder,
        seed: int = 0,
        rank: int = 0,
        shuffle_buffer: int = 1000,
        filter: Filter | None = None,
    ) -> None:
        super().__init__()
        self.shards = list(shards)
        self.decode = decode
        self.seed = seed
        self.rank = rank
        self.shuffle_buffer = shuffle_buffer
        self.filter = filter
        self.start = 0

    def __iter__(self) -> Iterator[StreamSample]:
        worker = get_worker_info()
        place = [self.seed, self.start, self.rank, 0 if worker is None else worker.id]
        draw, mix = (int(number) for number in np.random.SeedSequence(place).generate_state(2, np.uint64))
        skips: list[Skip] = []
        counts = FilterCounts()
        for number, item in enumerate(shuffled(self._items(draw), self.shuffle_buffer, random.Random(mix))):
            sample: Sample | None = None
            if isinstance(item, Skip):
                skips.append(item)
            elif isinstance(item, Removed):
                counts.add(FilterCounts(1, {item.reason: 1}))
            else:
                counts.num_samples += 1
                try:
                    image, caption, text = self.decode(item.members, partial(_generator, (*place, number)))
                except Unusable as fault:
                    skips.append(Skip(item.shard, item.key, fault.reason))
                else:
                    sample = Sample(image, caption, f"{shard_name(item.shard)}/{item.key}", 0, text)
            if sample is None and (len(skips) >= _MAX_FAULTS or counts.num_samples >= _MAX_REMOVED):
                sample = Sample(None, "", "", 0)
            if sample is not None:
                sample.skips = tuple(skips)
                yield StreamSample(**vars(sample), filter_counts=counts)
                skips, counts = [], FilterCounts()

    def _items(self, seed: int) -> Iterator[RawSample | Skip | Removed]:
        """Samples of shards drawn one after the other, in the order of each."""
        from webdataset.shardlists import ResampledShards

        for drawn in ResampledShards(self.shards, worker_seed=lambda: seed, deterministic=True):
            item: RawSample | Skip | None = None
            for item in SampleReader(drawn["url"]):
                reason = None
                if self.filter is not None and isinstance(item, RawSample):
                    reason = self.filter.why_not(parse_json(item.members[METADATA]))
                yield item if reason is None else Removed(reason)
            if item is None:
                yield Skip(drawn["url"], "", Reason.NO_IMAGE)


def _generator(place: Sequence[int], stream: int) -> np.random.Generator:
    """The draws of one sample: `stream` tells the crop's from the flip's."""
    return np.random.default_rng([*place, stream, 3])


def shard_name(address: str) -> str:
    """The name of a shard's file, or the command that gives it."""
    return address if address.startswith("pipe:") else PurePosixPath(address.split("?")[0]).name.split(".")[0]
