"""Captions of shards to stored text states: estimated, encoded by length, one file a shard, resumable, in parallel."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from imagen_lightning.data.shards import Shards
from imagen_lightning.data.skips import Reason, Skip, SkipLog, Unusable
from imagen_lightning.data.text_states import read_captions
from imagen_lightning.errors import InputError
from imagen_lightning.files import unwritable
from imagen_lightning.text.cached import DTYPES, SUFFIX, StatesFile, StatesWriter, stored_bytes
from imagen_lightning.text.identity import difference
from imagen_lightning.types import TextEncoder

_SAMPLED_SHARDS, _SAMPLED_CAPTIONS = 16, 4096
_TIMED_SECONDS = 3.0
_HEADROOM = 2**26  # bytes of the disk that are left alone


@dataclass(frozen=True)
class Settings:
    """How captions are stored.

    Attributes:
        dtype: "float16" or "int8".
        batch_size: captions encoded at once; those of a shard are taken by length.
        device: where the encoder runs.
        caption_field: see `decode_captions`; all captions of a sample are stored.
        rank: this process's number; it takes every `world_size`-th shard.
        world_size: number of processes.

    Raises:
        InputError: a value out of range.
    """

    dtype: str = "float16"
    batch_size: int = 64
    device: str = "cpu"
    caption_field: str | None = None
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"dtype {self.dtype!r} of stored states is unknown; use {' or '.join(DTYPES)}")
        if self.batch_size < 1:
            raise InputError(f"batch size {self.batch_size} must be at least 1")
        if not 0 <= self.rank < self.world_size:
            raise InputError(f"RANK {self.rank} must be from 0 to WORLD_SIZE - 1, and WORLD_SIZE is {self.world_size}")


@dataclass(frozen=True)
class Estimate:
    """What is left to store, judged by a sample of it.

    Attributes:
        num_shards: shards that are left.
        num_captions: different captions within a shard, summed over those shards.
        num_sampled: captions that the other figures come from.
        tokens: mean number of states a caption.
        at_limit: share of the captions that fill max_tokens, where some may be cut.
        num_bytes: of all the files.
        captions_per_second: of one process; None where nothing was timed.
        seconds: for all of it, over all processes; None likewise.
    """

    num_shards: int
    num_captions: int
    num_sampled: int
    tokens: float
    at_limit: float
    num_bytes: int
    captions_per_second: float | None = None
    seconds: float | None = None


@dataclass
class Result:
    """What one process stored: shards, different captions within a shard, and bytes; and what it left out."""

    num_shards: int
    num_captions: int
    num_bytes: int
    skips: SkipLog


class Embedding:
    """Stores the text states of shards' captions as `out/SHARD.safetensors`, one file a shard.

    A shard's file is whole or absent, so a run that was stopped goes on with the shards that it lacks.

    Args:
        shards: of different names.
        out: the folder, made when it is first written to.
        encoder: whose states they are.
        settings: how they are stored.

    Raises:
        InputError: two shards of one name; files in `out` of another encoder or settings, or of a shard that has
            changed since.
    """

    def __init__(self, shards: Shards, out: Path, encoder: TextEncoder, settings: Settings) -> None:
        twice = [stem for stem, count in Counter(index.stem for index in shards.indexes).items() if count > 1]
        if twice:
            raise InputError(f"several shards are called {twice[0]!r}: store each folder's in a folder of their own")
        if out.exists() and not out.is_dir():
            raise InputError(f"{str(out)!r} is a file; give a folder")
        self.shards = shards
        self.out = out
        self.encoder = encoder
        self.settings = settings
        self.left = self._unfinished(encoder.identity())
        """Numbers of the shards that have no file yet, of all processes."""

    def _target(self, shard: int) -> Path:
        return self.out / f"{self.shards.indexes[shard].stem}{SUFFIX}"

    def _metadata(self, shard: int, identity: dict[str, str]) -> dict[str, str]:
        index = self.shards.indexes[shard]
        return {
            **identity,
            "dtype": self.settings.dtype,
            "caption_field": self.settings.caption_field or "",
            "source": index.stem,
            "source_bytes": str(index.size),
        }

    def _unfinished(self, identity: dict[str, str]) -> list[int]:
        left = []
        for shard in range(len(self.shards.indexes)):
            target = self._target(shard)
            if not target.exists():
                left.append(shard)
                continue
            apart = difference(StatesFile(target).metadata, self._metadata(shard, identity))
            if apart is not None:
                name, stored, wanted = apart
                raise InputError(
                    f"{str(target)!r} holds other states: {name} is {stored!r} there and {wanted!r} now; give another "
                    "folder, or delete what is there"
                )
        return left

    def estimate(self, timed: bool = True) -> Estimate:
        """Judges what is left by captions of up to 16 shards, and the time by encoding some of them.

        Args:
            timed: whether to encode any; the encoder's weights are loaded for it.

        Raises:
            InputError: no caption can be used.
        """
        captions, num_captions = self._sample()
        counts = self._num_tokens(captions)
        tokens, dim, world = float(np.mean(counts)), self.encoder.dim, self.settings.world_size
        size = stored_bytes(num_captions, round(tokens * num_captions), dim, self.settings.dtype)
        at_limit = float(np.mean([count >= self.encoder.max_tokens for count in counts]))
        estimate = Estimate(len(self.left), num_captions, len(captions), tokens, at_limit, size)
        if not timed:
            return estimate
        rate = self._rate(captions, counts)
        busiest = -(-len(self.left) // min(world, len(self.left)))  # shards of the process that has most
        seconds = num_captions / rate * busiest / len(self.left)
        return Estimate(**{**vars(estimate), "captions_per_second": rate, "seconds": seconds})

    def _sample(self) -> tuple[list[str], int]:
        """Captions of some of the shards that are left, and about how many different ones there are in all."""
        places = np.unique(np.linspace(0, len(self.left) - 1, _SAMPLED_SHARDS).round().astype(int))
        chosen = [self.left[place] for place in places.tolist()]
        captions: list[str] = []
        found = sampled = 0.0
        for shard in chosen:
            num_samples = self.shards.indexes[shard].num_samples
            wanted = min(num_samples, -(-_SAMPLED_CAPTIONS // len(chosen)))
            here = list(self._captions(shard, np.linspace(0, num_samples - 1, wanted).round().astype(int)))
            captions += here
            found += len(set(here)) * num_samples / max(wanted, 1)
            sampled += num_samples
        if not captions:
            raise InputError(f"no caption of {self.shards.indexes[chosen[0]].shard!r} can be used; check caption_field")
        return captions, round(found * sum(self.shards.indexes[shard].num_samples for shard in self.left) / sampled)

    def _captions(self, shard: int, rows: np.ndarray, skips: SkipLog | None = None) -> Iterator[str]:
        """All captions of some rows of a shard.

        Raises:
            InputError: the shard cannot be read: without its captions its file would look whole.
        """
        name = self.shards.indexes[shard].shard
        for row in rows.tolist():
            try:
                yield from read_captions(self.shards, shard, row, self.settings.caption_field)
            except Unusable as fault:  # noqa: PERF203
                if fault.reason in (Reason.UNREADABLE_SHARD, Reason.TRUNCATED_SHARD):
                    raise InputError(f"shard {name!r} cannot be read to its end; mend it and run again") from None
                if skips is not None:
                    skips.note([Skip(name, self.shards.key(shard, row), fault.reason)])

    def _num_tokens(self, captions: Sequence[str]) -> list[int]:
        size = self.settings.batch_size
        parts = (captions[begin : begin + size] for begin in range(0, len(captions), size))
        return [count for part in parts for count in self.encoder.num_tokens(part)]

    def _rate(self, captions: Sequence[str], counts: Sequence[int]) -> float:
        """Captions a second, by batches of the sample from the middling lengths outwards, as long as they take."""
        order = np.argsort(counts, kind="stable")
        size = self.settings.batch_size
        batches = [order[begin : begin + size].tolist() for begin in range(0, len(order), size)]
        batches.sort(key=lambda batch: abs(batch[0] - len(order) / 2))
        self._encode([captions[number] for number in batches[0][:1]])  # loads the weights
        start = time.perf_counter()
        tokens = 0
        for batch in batches:
            self._encode([captions[number] for number in batch])
            tokens += sum(counts[number] for number in batch)
            seconds = time.perf_counter() - start
            if seconds > _TIMED_SECONDS:
                break
        return tokens / seconds / float(np.mean(counts))

    def _encode(self, captions: Sequence[str]) -> None:
        self.encoder(captions, self.settings.device).states.sum().item()  # waits for an accelerator

    def check_room(self, estimate: Estimate) -> None:
        """Raises InputError where the disk has no room for the states."""
        folder = next(path for path in (self.out, *self.out.absolute().parents) if path.exists())
        free = shutil.disk_usage(folder).free
        if estimate.num_bytes + _HEADROOM > free:
            raise InputError(
                f"the states take about {readable_bytes(estimate.num_bytes)}, {readable_bytes(_HEADROOM)} more are to "
                f"stay free, and {str(folder)!r} has {readable_bytes(free)} left: make room, give another folder"
                + (", or store int8" if self.settings.dtype == "float16" else "")
            )

    def run(self, num_captions: int | None = None, progress: bool = True) -> Result:
        """Stores this process's share of the shards that are left.

        Args:
            num_captions: about how many captions that is, for the time left.
            progress: show a bar where the error output is a terminal.

        Raises:
            InputError: states that are not finite, a shard that cannot be read, a disk without room, or another
                process that writes the same file; the files that are whole stay.
        """
        settings = self.settings
        mine = sorted(set(range(settings.rank, len(self.shards.indexes), settings.world_size)) & set(self.left))
        result = Result(0, 0, 0, SkipLog(max_share=1.0))
        if not mine:
            return result
        empty = self.encoder([""], settings.device)  # loads the weights, so that their files are at hand
        self._unfinished(identity := self.encoder.identity())
        identity["mask"] = "none" if empty.mask is None else "tokens"
        with tqdm(total=num_captions, unit=" captions", disable=None if progress else True) as bar:
            for done, shard in enumerate(mine):
                bar.set_postfix_str(f"shard {done + 1} of {len(mine)}")
                self.shards.prefetch(mine[done : done + 2])
                try:
                    self.out.mkdir(parents=True, exist_ok=True)
                    count = self._store(shard, identity, empty.states.shape[2], result.skips, bar.update)
                except OSError as error:  # of the file or the folder for it
                    raise unwritable(error, self.out) or error from error
                result.num_shards += 1
                result.num_captions += count
                result.num_bytes += self._target(shard).stat().st_size
        return result

    def _store(
        self, shard: int, identity: dict[str, str], dim: int, skips: SkipLog, advance: Callable[[int], object]
    ) -> int:
        """Writes one shard's file and returns its number of captions."""
        index = self.shards.indexes[shard]
        skips.note(index.skips)
        captions = sorted({"", *self._captions(shard, np.arange(index.num_samples), skips)})
        num_tokens = dict(zip(captions, self._num_tokens(captions)))
        captions.sort(key=lambda caption: num_tokens[caption], reverse=True)  # what does not fit shows at once
        metadata = self._metadata(shard, identity)
        with StatesWriter(self._target(shard), num_tokens, dim, self.settings.dtype, metadata) as writer:
            for begin in range(0, len(captions), self.settings.batch_size):
                batch = captions[begin : begin + self.settings.batch_size]
                writer.write(batch, self.encoder(batch, self.settings.device))
                advance(len(batch))
        return len(captions)


def readable_bytes(number: float) -> str:
    """ "512 bytes", "1.5 MB", "3.2 TB"."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1000
    raise AssertionError


def readable_time(seconds: float) -> str:
    """ "40 s", "12 min", "3.5 h", "4.2 days"."""
    for unit, length, limit in (("s", 1, 90), ("min", 60, 5400), ("h", 3600, 172800)):
        if seconds < limit:
            return f"{seconds / length:.1f} {unit}" if unit == "h" else f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"
