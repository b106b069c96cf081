"""Shards: tar files of samples in webdataset's layout, found, opened, read by offset, and written.

A sample is a group of members `KEY.suffix`. Known suffixes are `jpg`, `jpeg`, `jpe`, `jfif`, `png`, `webp` (the image),
`txt` and `json` (captions) and `text.npz` (stored text states); members of any other suffix are counted and never
read. Nothing is extracted, executed or unpickled: of webdataset only the tar writer is used.

Samples are read by `pread` and not through a memory map: a process that reads a mapped page of a file that was cut
meanwhile is killed (SIGBUS), where `pread` returns fewer bytes and the sample is left out and counted.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from imagen_lightning.data.braces import expand_braces
from imagen_lightning.data.index import (
    ShardIndex,
    cache_folder,
    index_bytes,
    index_shard,
    map_shards,
    open_index,
)
from imagen_lightning.data.remote import expand_addresses, is_remote
from imagen_lightning.data.shard_cache import PATIENCE, CacheFull, ReadAhead, ShardCache
from imagen_lightning.data.skips import Reason, Skip, Unusable
from imagen_lightning.data.walk import (
    CAPTION,
    IMAGE,
    METADATA,
    NUM_KINDS,
    SUFFIXES,
    TEXT_STATES,
    hash_sample,
    hash_samples,
)
from imagen_lightning.errors import InputError
from imagen_lightning.io.atomic import temporary_path, write_bytes

__all__ = [
    "CAPTION",
    "IMAGE",
    "METADATA",
    "NUM_KINDS",
    "SUFFIXES",
    "TEXT_STATES",
    "ShardIndex",
    "ShardWriter",
    "Shards",
    "expand_shards",
    "index_shard",
    "list_shards",
    "open_shards",
]

Verify = Literal["none", "sha256"]
Members = tuple[bytes | None, bytes | None, bytes | None, bytes | None]

_MAX_OPEN_FILES = 64
_MAX_OPEN_CACHED = 16
_GAP = 2**16  # bytes between members that are read along rather than skipped


def list_shards(patterns: str | Path | Sequence[str | Path]) -> list[str]:
    """Paths, folders (their *.tar), globs and braces, such as `train-{00000..00009}.tar`, and addresses likewise, such
    as `s3://bucket/train-{00000..00009}.tar`, to shards in order.

    Raises:
        InputError: a pattern that matches nothing, or a shard named twice.
    """
    shards: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str | Path) else patterns:
        text = os.path.expanduser(pattern).removeprefix("file://")
        shards.extend(expand_addresses(text) if is_remote(text) else _expand_paths(text))
    shard, count = Counter(shards).most_common(1)[0] if shards else (None, 1)
    if shard is None or count > 1:
        raise InputError("no shards were named" if shard is None else f"shard {shard!r} is named {count} times")
    return shards


def expand_shards(patterns: str | Path | Sequence[str | Path]) -> list[Path]:
    """`list_shards` of local files alone.

    Raises:
        InputError: a pattern that matches no file, an address that is not a local file, or a shard named twice.
    """
    for pattern in [patterns] if isinstance(patterns, str | Path) else patterns:
        if is_remote(str(pattern)):
            raise InputError(f"shards {str(pattern)!r}: only local files can be read; copy the shards here first")
    return [Path(shard) for shard in list_shards(patterns)]


def _expand_paths(text: str) -> list[str]:
    if text.startswith("pipe:"):
        raise InputError(f"shards {text!r}: only local files can be read; copy the shards here first")
    shards: list[str] = []
    for name in [text] if os.path.exists(text) else expand_braces(text):
        if os.path.isdir(name):
            found = sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
        else:
            found = [name] if os.path.exists(name) else match_files(name)
        if not found:
            missing = f"shards {text!r}" + (f" ({name!r})" if name != text else "")
            brackets = "; [ ] stands for one of the characters in it" if "[" in name else ""
            raise InputError(f"{missing} match no file; check the path (from {os.getcwd()}){brackets}")
        shards.extend(str(Path(path)) for path in found)
    return shards


def match_files(pattern: str) -> list[str]:
    """Return the sorted paths that a glob matches; its brackets stand for themselves where such paths exist."""
    literal = glob.glob(pattern.replace("[", "[[]"), recursive=True)
    return sorted(literal or glob.glob(pattern, recursive=True))


def open_shards(
    patterns: str | Path | Sequence[str | Path],
    *,
    verify: Verify = "none",
    cache: Path | None = None,
    cache_bytes: int = 20 * 10**9,
    read_ahead: int = 16,
) -> Shards:
    """Finds shards and reads their indexes, making those that are missing or stale.

    Args:
        patterns: see `list_shards`.
        verify: "sha256" compares each sample with its SHA-256; shards without are hashed first.
        cache: the folder for remote shards, their indexes, and those of shards in folders that cannot be written;
            None is `cache_folder()`.
        cache_bytes: most bytes of remote shards that are kept there.
        read_ahead: number of shards that are read from or fetched ahead at once.

    Raises:
        InputError: see `list_shards`; a shard that cannot be read, or a cache that is too small for `read_ahead`.
    """
    if verify not in ("none", "sha256"):
        raise InputError(f"verify {verify!r} is unknown; give 'none' or 'sha256'")
    names = list_shards(patterns)
    folder = cache or cache_folder()
    remote = ShardCache(folder, cache_bytes) if any(is_remote(name) for name in names) else None

    if remote is not None:
        remote.prepare()

    def open_one(name: str) -> ShardIndex:
        if remote is not None and is_remote(name):
            return remote.open_index(name)
        return open_index(name, hashes=verify == "sha256", cache=folder)

    indexes = list(map_shards(open_one, names))
    if remote is not None:
        remote.check([index.size for index in indexes if is_remote(index.shard)], read_ahead)
    return Shards(indexes, verify, remote)


class Shards:
    """Indexed shards, read by (shard, row); it may be shared by forked and spawned processes.

    Args:
        indexes: one a shard.
        verify: "sha256" compares each sample with its SHA-256 when it is read whole.
        cache: where remote shards are read from.
    """

    def __init__(self, indexes: Sequence[ShardIndex], verify: Verify = "none", cache: ShardCache | None = None) -> None:
        self.indexes = list(indexes)
        self.verify = verify
        self.cache = cache
        self._files: OrderedDict[int, int] = OrderedDict()
        self._ahead: ReadAhead | None = None

    def key(self, shard: int, row: int) -> str:
        """A sample's name; "" where the index has gone with the shard."""
        try:
            return self.indexes[shard].keys[row]
        except Unusable:
            return ""

    def sample(self, shard: int, row: int) -> Members:
        """The bytes of a sample's image, caption, metadata and text states, each None where it has none.

        Raises:
            Unusable: the file is gone or shorter than when it was indexed, the disk fails, or the SHA-256 differs.
        """
        index = self.indexes[shard]
        spans = index.spans[row].tolist()
        present = [(kind, offset, length) for kind, (offset, length) in enumerate(spans) if offset >= 0]
        first = min(offset for _, offset, _ in present)
        stop = max(offset + length for _, offset, length in present)
        found: list[bytes | None] = [None] * NUM_KINDS
        if stop - first <= sum(length for _, _, length in present) + _GAP:
            extent = self._pread(shard, first, stop - first)
            for kind, offset, length in present:
                found[kind] = extent[offset - first : offset - first + length]
        else:
            for kind, offset, length in present:
                found[kind] = self._pread(shard, offset, length)
        if self.verify == "sha256" and hash_sample(found) != index.digests()[row].tobytes():
            raise Unusable(Reason.HASH_MISMATCH)
        return found[IMAGE], found[CAPTION], found[METADATA], found[TEXT_STATES]

    def read(self, shard: int, row: int, kind: int, most: int | None = None) -> bytes | None:
        """The bytes of one member, not compared with any SHA-256, or None where the sample has none.

        Args:
            shard, row: the sample.
            kind: of the member.
            most: the number of its first bytes that are enough; None reads it whole.

        Raises:
            Unusable: the file is gone or shorter than when it was indexed, or the disk fails.
        """
        offset, length = self.indexes[shard].spans[row, kind].tolist()
        return None if offset < 0 else self._pread(shard, offset, length if most is None else min(length, most))

    def damage(self, shard: int) -> list[Skip]:
        """Reads a whole shard and names the samples that differ from their SHA-256 or cannot be read."""
        index = self.indexes[shard]
        try:
            differ = (hash_samples(self._file(shard), index.spans) != index.digests()).any(1)
        except OSError:
            return [Skip(index.shard, "", Reason.UNREADABLE_SHARD)]
        except Unusable as fault:
            return [Skip(index.shard, "", fault.reason)]
        return [Skip(index.shard, index.keys[row], self._fault(shard, row)) for row in np.flatnonzero(differ).tolist()]

    def _fault(self, shard: int, row: int) -> Reason:
        """Why a sample that differs does so."""
        try:
            self.sample(shard, row)
        except Unusable as fault:
            return fault.reason
        return Reason.HASH_MISMATCH

    def _pread(self, shard: int, offset: int, length: int) -> bytes:
        try:
            data = os.pread(self._file(shard), length, offset)
        except OSError:
            raise Unusable(Reason.UNREADABLE_SHARD) from None
        if len(data) < length:
            raise Unusable(Reason.TRUNCATED_SHARD)
        return data

    def paths_beside(self) -> list[Path]:
        """A path for each shard, where files that belong to it lie or may be put: its own, or one in the cache."""
        cache = self.cache
        if cache is None:
            return [index.path for index in self.indexes]
        names = [index.shard for index in self.indexes]
        return list(map_shards(lambda name: cache.path_beside(name) if is_remote(name) else Path(name), names))

    def prefetch(self, shards: Sequence[int]) -> None:
        """Has remote shards fetched that will be needed, in that order, and lets go of all others."""
        if self.cache is None:
            return
        for shard in [shard for shard in self._files if shard not in shards]:
            self._close(shard)
        if self._ahead is None or self._ahead.process != os.getpid():
            self._ahead = ReadAhead(self.cache)
        self._ahead.want([self.indexes[shard] for shard in shards if is_remote(self.indexes[shard].shard)])

    def _file(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        index = self.indexes[shard]
        if self.cache is None or not is_remote(index.shard):
            self._files[shard] = os.open(index.shard, os.O_RDONLY)
        else:
            self._files[shard] = self._cached(self.cache, index)
        while len(self._files) > (_MAX_OPEN_FILES if self.cache is None else _MAX_OPEN_CACHED):
            self._close(next(iter(self._files)))
        return self._files[shard]

    def _cached(self, cache: ShardCache, index: ShardIndex) -> int:
        try:
            return cache.open(index)
        except CacheFull:
            self.close()
        return cache.open(index, PATIENCE)

    def close(self) -> None:
        for shard in list(self._files):
            self._close(shard)

    def _close(self, shard: int) -> None:
        descriptor = self._files.pop(shard)
        if self.cache is None:
            os.close(descriptor)
        else:
            self.cache.close(descriptor)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_ahead": None}

    def __del__(self) -> None:
        self.close()


class ShardWriter:
    """Writes `PREFIX-00000.tar`, `PREFIX-00001.tar`, … and their indexes; each appears when it is whole.

    Use it as a context: leaving it finishes the last shard, leaving it by an error removes the unfinished one.

    Args:
        folder: must exist.
        prefix: the first part of the shards' names.
        shard_size: samples of a shard.
    """

    def __init__(self, folder: Path, prefix: str, shard_size: int) -> None:
        self.folder = folder
        self.prefix = prefix
        self.shard_size = shard_size
        self.num_samples = 0
        self.paths: list[Path] = []
        self._tar: Any = None
        self._file: Any = None
        self._path = self._partial = folder

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Adds a sample: suffix to bytes."""
        from webdataset.writer import TarWriter

        if self._tar is None:
            self._path = self.folder / self._name()
            self._partial = temporary_path(self._path)
            self._file = self._partial.open("wb")
            self._tar = TarWriter(self._file, encoder=False, mtime=0)
        self._tar.write({"__key__": key, **members})
        self.num_samples += 1
        if self.num_samples % self.shard_size == 0:
            self._finish()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        try:
            if self._tar is not None and error is None:
                self._finish()
        finally:
            if self._tar is not None:  # an error, here or in the context
                with contextlib.suppress(OSError):
                    self._tar.close()
                    self._file.close()
                self._partial.unlink()
                self._tar = self._file = None

    def _name(self) -> str:
        return f"{self.prefix}-{len(self.paths):05d}.tar"

    def _finish(self) -> None:
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        partial, path = self._partial, self._path
        # The index first: no shard is ever without one, and one without its shard is replaced by the next writer's.
        index = path.with_name(f"{path.name}.index")
        write_bytes(index, index_bytes(index_shard(partial, hashes=True)))
        try:
            os.replace(partial, path)
        except OSError:
            index.unlink()
            raise
        self.paths.append(path)
        self._tar = self._file = None
