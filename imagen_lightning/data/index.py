"""Shard indexes: where each member of each sample lies, and each sample's SHA-256.

An index is one safetensors file a shard, `SHARD.tar.index`, beside it or in a cache folder. It is stale where the
shard's size or time of change differ, and then made anew. Its arrays are read when they are needed and few of them are
kept, so that the shards of a window, not of a whole data set, take memory. They are read, not mapped: Python keeps a
file descriptor for each mapping, and thousands of shards would exhaust them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, overload

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError
from tqdm import tqdm

from imagen_lightning.data.skips import Reason, Skip, Unusable
from imagen_lightning.data.walk import (
    CAPTION,
    IMAGE,
    METADATA,
    NUM_KINDS,
    SUFFIXES,
    Arrays,
    hash_samples,
    json_fields,
    walk,
)
from imagen_lightning.errors import InputError
from imagen_lightning.io.atomic import write_bytes

log = logging.getLogger(__name__)

T = TypeVar("T")

INDEX_FORMAT = "imagen-lightning index 2"

_FIRST_FORMAT = "imagen-lightning index 1"  # whose walk passed over samples whose keys have dots, and other images

_FIRST_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "txt", "json", "text.npz"})
MAX_WORKERS = 1024

_TICK_NS = 20_000_000  # the clock of file times, at its coarsest
_NUM_KEPT = 128  # shards whose arrays are kept
_NUM_THREADS = 8
_BAR_FROM = 16  # shards


class Keys(Sequence[str]):
    """The names of a shard's samples, decoded as they are asked for."""

    def __init__(self, arrays: Arrays) -> None:
        self._text = arrays.key_text
        self._ends = arrays.key_ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        number = range(len(self))[row]
        begin = self._ends[number - 1] if number else 0
        return self._text[begin : self._ends[number]].tobytes().decode("utf-8", "backslashreplace")


@dataclass(eq=False)
class ShardIndex:
    """Where the samples of one shard lie.

    Attributes:
        shard: the tar's path or address.
        num_samples: n.
        size: bytes of the tar when it was indexed.
        mtime: its time of change then, in ns; None for a remote shard.
        members: number of members by suffix (see `walk`), those that are not read too.
        fields: names of the json's fields, from a few samples.
        skips: samples left out for the shard's own faults.
        hashed: whether the samples have their SHA-256.
        held: the arrays, where no file holds them.
        file: the index file that holds them.
    """

    shard: str
    num_samples: int
    size: int
    mtime: int | None
    members: dict[str, int]
    fields: list[str]
    skips: list[Skip]
    hashed: bool
    held: Arrays | None = field(default=None, repr=False)
    file: Path | None = None

    @property
    def keys(self) -> Keys:
        """n names, unique within the shard."""
        return Keys(self.arrays)

    @property
    def spans(self) -> np.ndarray:
        """(n, 4, 2) int64, offset and length of the members IMAGE, CAPTION, METADATA and TEXT_STATES; offset -1 where a
        sample has none."""
        return self.arrays.spans

    @property
    def unread(self) -> dict[str, int]:
        """The number of members that are not read, by suffix."""
        return {suffix: count for suffix, count in self.members.items() if suffix not in SUFFIXES}

    def missing(self) -> dict[Reason, int]:
        """The number of samples without image, and without txt or json."""
        present = self.spans[:, :, 0] >= 0
        captioned = present[:, CAPTION] | present[:, METADATA]
        return {Reason.NO_IMAGE: int((~present[:, IMAGE]).sum()), Reason.NO_CAPTION: int((~captioned).sum())}

    def digests(self) -> np.ndarray:
        """(n, 32) uint8: see `hash_samples`.

        Raises:
            Unusable: the index file and the shard have gone or changed, or the samples have no SHA-256.
        """
        digests = self.arrays.sha256
        if digests is None:
            raise Unusable(Reason.HASH_MISMATCH)
        return digests

    @property
    def path(self) -> Path:
        """A local shard's path."""
        return Path(self.shard)

    @property
    def stem(self) -> str:
        """The shard's file name without its folders and last suffix."""
        return PurePosixPath(self.shard.split("?")[0] if "://" in self.shard else self.shard).stem

    @property
    def arrays(self) -> Arrays:
        """What there is of each sample, read from the index file if need be.

        Raises:
            Unusable: the index file cannot be read and the shard is not what it was.
        """
        return _stored_arrays(self) if self.held is None else self.held

    def agrees(self, other: ShardIndex) -> bool:
        """Whether `other` is an index of the same state of the shard, with all that this one has."""
        same = (self.num_samples, self.size, self.mtime) == (other.num_samples, other.size, other.mtime)
        return same and other.hashed >= self.hashed


@lru_cache(maxsize=_NUM_KEPT)
def _stored_arrays(index: ShardIndex) -> Arrays:
    file = index.file or Path(f"{index.shard}.index")
    for stored in read_indexes(index.shard, [file]):
        if stored.held is not None and index.agrees(stored):
            return stored.held
    log.warning("index %s is not what it was; its shard is walked again", file)
    try:
        walked = index_shard(index.shard, index.hashed)
    except InputError:
        raise Unusable(Reason.UNREADABLE_SHARD) from None
    if walked.held is None or not index.agrees(walked):
        raise Unusable(Reason.UNREADABLE_SHARD)
    return walked.held


def index_shard(shard: str | Path, hashes: bool = False) -> ShardIndex:
    """Walks the headers of a local tar, and hashes its samples if asked to; nothing is written.

    A sample is left out whole when any of its members is: one that a truncated file cuts off, a name with `..` or an
    absolute one, a link or device, two members of one kind. Where the end-of-archive mark is missing, the last
    sample may lack members and is left out.

    Raises:
        InputError: the file cannot be read, or is compressed.
    """
    path = os.fspath(shard)
    with _opened(path) as descriptor:
        status = os.fstat(descriptor)
        arrays, faults, members = walk(descriptor, path)
        if hashes:
            arrays = arrays._replace(sha256=hash_samples(descriptor, arrays.spans))
        fields = json_fields(descriptor, arrays.spans)
    skips = [Skip(path, key, reason) for key, reason in faults.items()]
    size, mtime = status.st_size, status.st_mtime_ns
    return ShardIndex(path, len(arrays.spans), size, mtime, members, fields, skips, hashes, arrays)


@contextmanager
def _opened(path: str) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        raise InputError(f"shard {path!r} cannot be read: {error.strerror}") from None


def index_bytes(index: ShardIndex) -> bytes:
    """The contents of an index file: a safetensors file of the arrays, all else in its metadata."""
    arrays = {name: value for name, value in index.arrays._asdict().items() if value is not None}
    metadata = {
        "format": INDEX_FORMAT,
        "size": index.size,
        "mtime": index.mtime,
        "num_samples": index.num_samples,
        "members": index.members,
        "fields": index.fields,
        "skips": [[skip.key, skip.reason.name] for skip in index.skips],
    }
    metadata["crc32"] = _crc32(metadata, arrays)
    return safetensors.numpy.save(arrays, {"index": json.dumps(metadata)})  # one entry: safetensors shuffles several


def _crc32(metadata: dict[str, Any], arrays: dict[str, np.ndarray]) -> int:
    crc = zlib.crc32(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(arrays):
        crc = zlib.crc32(np.ascontiguousarray(arrays[name]).data, crc)
    return crc


def parse_index(data: bytes, shard: str) -> ShardIndex:
    """The index that `index_bytes` wrote, of a shard of any name.

    Raises:
        ValueError: damaged, or of another format.
    """
    try:
        arrays = safetensors.numpy.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = json.loads(header["__metadata__"]["index"])
        if metadata["format"] == _FIRST_FORMAT and not metadata["members"].keys() <= _FIRST_SUFFIXES:
            raise ValueError("it is of an older format, which passed over members of other suffixes")
        if metadata["format"] not in (INDEX_FORMAT, _FIRST_FORMAT):
            raise ValueError(f"its format is {metadata['format']!r}, not {INDEX_FORMAT!r}")
        if metadata.pop("crc32") != _crc32(metadata, arrays):
            raise ValueError("its checksum does not fit")
        held = Arrays(**arrays)
        _check(held, metadata["num_samples"], metadata["size"])
        skips = [Skip(shard, key, Reason[name]) for key, name in metadata["skips"]]
        about = {name: metadata[name] for name in ("num_samples", "size", "mtime", "members", "fields")}
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no index: {error}") from None
    return ShardIndex(shard, **about, skips=skips, hashed=held.sha256 is not None, held=held)


def _check(arrays: Arrays, num_samples: int, size: int) -> None:
    """Raises ValueError where arrays do not fit each other or the shard."""
    shapes = ((num_samples, NUM_KINDS, 2), (num_samples,))
    if (arrays.spans.shape, arrays.key_ends.shape) != shapes or arrays.key_text.dtype != np.uint8:
        raise ValueError("its arrays do not fit each other")
    if arrays.sha256 is not None and (arrays.sha256.shape != (num_samples, 32) or arrays.sha256.dtype != np.uint8):
        raise ValueError("its SHA-256 do not fit")
    if arrays.spans.dtype != np.int64 or arrays.key_ends.dtype != np.int64:
        raise ValueError("its numbers are not int64")
    offset, length = arrays.spans[..., 0], arrays.spans[..., 1]
    if ((offset < -1) | (length < 0) | (offset > size) | (length > size - offset)).any():
        raise ValueError("its members lie outside of the shard")


def cache_folder() -> Path:
    """Where indexes of read-only shards, and remote shards, are kept: $IMAGEN_LIGHTNING_CACHE, else
    `imagen-lightning` in the user's cache folder."""
    own = os.environ.get("IMAGEN_LIGHTNING_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "imagen-lightning"


def cached_index(shard: str, cache: Path) -> Path:
    """The index file of a shard in a cache folder."""
    digest = hashlib.sha256(shard.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return cache / "indexes" / f"{Path(shard.split('?')[0]).name}-{digest}.index"


def index_files(shard: str, cache: Path) -> list[Path]:
    """Where a local shard's index may lie, the best place first."""
    path = Path(shard)
    return [path.with_name(f"{path.name}.index"), cached_index(os.path.abspath(path), cache)]


def open_index(shard: str, *, hashes: bool = False, cache: Path | None = None, force: bool = False) -> ShardIndex:
    """Reads a local shard's index, or makes and keeps it where there is none, or one that is stale or damaged.

    Where a shard's time of change differs but not its layout, as after a copy, its SHA-256 are kept.

    Args:
        shard: the tar.
        hashes: whether the samples must have their SHA-256.
        cache: the folder for indexes of shards in folders that cannot be written; None is `cache_folder()`.
        force: make it anew in any case.

    Raises:
        InputError: the shard cannot be read, or is compressed.
    """
    files = index_files(shard, cache or cache_folder())
    old = None if force else max(read_indexes(shard, files), key=is_fresh, default=None)
    if old is not None and is_fresh(old) and hashes <= old.hashed:
        return replace(old, held=None)
    _await_clock(shard)
    index = index_shard(shard)
    if old is not None and old.hashed and _same_layout(old, index):
        log.warning("shard %s has another time of change but the same layout: its SHA-256 are kept", shard)
        index = replace(index, held=old.arrays, hashed=True)
    elif old is not None:
        fault = "is stale, for its shard has changed" if not is_fresh(old) else "has no SHA-256"
        log.warning("index %s %s; it is made anew", old.file, fault)
    if hashes and not index.hashed:
        with _opened(shard) as descriptor:
            held = index.arrays._replace(sha256=hash_samples(descriptor, index.spans))
        index = replace(index, held=held, hashed=True)
    return keep_index(index, files)


def read_indexes(shard: str, files: Iterable[Path]) -> list[ShardIndex]:
    """The indexes that these files hold; the damaged ones are told in the log."""
    found: list[ShardIndex] = []
    for file in files:
        try:
            found.append(replace(parse_index(file.read_bytes(), shard), file=file))
        except FileNotFoundError:  # noqa: PERF203
            continue
        except (OSError, ValueError) as error:
            log.warning("index %s cannot be used: %s", file, error)
    return found


def is_fresh(index: ShardIndex) -> bool:
    """Whether a local shard has the size and time of change that it had when it was indexed.

    Raises:
        InputError: the shard cannot be read.
    """
    with _opened(index.shard) as descriptor:
        status = os.fstat(descriptor)
    return (index.size, index.mtime) == (status.st_size, status.st_mtime_ns)


def _await_clock(shard: str) -> None:
    """Waits until a change to the shard, from now on, gives it another time of change."""
    with _opened(shard) as descriptor:
        age = time.time_ns() - os.fstat(descriptor).st_mtime_ns
    if 0 <= age < _TICK_NS:
        time.sleep((_TICK_NS - age) / 1e9)


def _same_layout(first: ShardIndex, second: ShardIndex) -> bool:
    pairs = [(getattr(first.arrays, name), getattr(second.arrays, name)) for name in ("spans", "key_text", "key_ends")]
    return first.size == second.size and all(np.array_equal(a, b) for a, b in pairs)


def keep_index(index: ShardIndex, files: Iterable[Path]) -> ShardIndex:
    """Writes an index to the first of these files that can be written; the arrays are then read from there.

    A folder without any write permission is left alone, also where this user may write everywhere.
    """
    data = index_bytes(index)
    for file in files:
        try:
            if file.parent.exists() and not file.parent.stat().st_mode & 0o222:
                continue
            write_bytes(file, data)
        except OSError as error:
            log.info("index %s cannot be written: %s", file, error.strerror)
        else:
            return replace(index, held=None, file=file)
    log.warning("the index of %s can be kept nowhere and is made each time; set IMAGEN_LIGHTNING_CACHE", index.shard)
    return index


def check_workers(number: int) -> None:
    """Raise InputError for a number of processes out of range."""
    if not 0 <= number <= MAX_WORKERS:
        raise InputError(f"{number} workers are out of range; give a number from 0 to {MAX_WORKERS}")


def map_shards(job: Callable[[str], T], shards: Sequence[str], processes: int = 0) -> Iterator[T]:
    """A job of each shard, in order, by that many processes, or by threads where it is 0; with a bar where many.

    Raises:
        InputError: the number of processes is out of range.
    """
    check_workers(processes)
    if len(shards) < 2:
        yield from map(job, shards)
        return
    pool: ProcessPoolExecutor | ThreadPoolExecutor = (
        ProcessPoolExecutor(processes, get_context("spawn")) if processes else ThreadPoolExecutor(_NUM_THREADS)
    )
    bar = None if len(shards) >= _BAR_FROM else True  # None shows it on a terminal alone
    with pool:
        yield from tqdm(pool.map(job, shards), "shards", len(shards), unit=" shards", disable=bar)
