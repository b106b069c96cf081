"""Shards: tar files of samples in webdataset's layout, found, indexed, read by offset, and written.

A sample is a group of members `KEY.suffix`. Known suffixes are `jpg`, `jpeg`, `png`, `webp` (the image), `txt` and
`json` (captions) and `text.npz` (stored text states); members of any other suffix are never read. Nothing is extracted,
executed or unpickled: of webdataset only the tar writer is used.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imagen_lightning.data.skips import Reason, Skip, Unusable
from imagen_lightning.types import InputError

IMAGE, CAPTION, METADATA, TEXT_STATES = range(4)
NUM_KINDS = 4
SUFFIXES = {
    "jpg": IMAGE,
    "jpeg": IMAGE,
    "png": IMAGE,
    "webp": IMAGE,
    "txt": CAPTION,
    "json": METADATA,
    "text.npz": TEXT_STATES,
}

_BLOCK = 512
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_MAX_OPEN_FILES = 64


def expand_shards(patterns: str | Path | Sequence[str | Path]) -> list[Path]:
    """Paths, folders (their *.tar), globs and braces, such as `train-{00000..00009}.tar`, to shard files in order.

    Raises:
        InputError: a pattern that matches no file, an address that is not a local file, or a shard named twice.
    """
    from braceexpand import braceexpand

    shards: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str | Path) else patterns:
        text = os.path.expanduser(pattern)
        if re.match(r"[a-z0-9]+://|pipe:", text):
            raise InputError(f"shards {text!r}: only local files can be read; copy the shards here first")
        try:
            alternatives = [text] if os.path.exists(text) else list(braceexpand(text))
        except ValueError:
            raise InputError(f"shards {text!r}: the braces do not pair") from None
        for name in alternatives:
            if os.path.isdir(name):
                found = sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
            else:
                found = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
            if not found:
                missing = f"shards {text!r}" + (f" ({name!r})" if name != text else "")
                raise InputError(f"{missing} match no file; check the path (from {os.getcwd()})")
            shards.extend(Path(path) for path in found)
    path, count = Counter(shards).most_common(1)[0] if shards else (None, 1)
    if path is None or count > 1:
        raise InputError("no shards were named" if path is None else f"shard {str(path)!r} is named {count} times")
    return shards


@dataclass
class ShardIndex:
    """Where the samples of one shard lie.

    Attributes:
        path: the tar file.
        keys: n names, unique within the shard.
        spans: (n, 4, 2) int64, offset and length of the members IMAGE, CAPTION, METADATA and TEXT_STATES; offset -1
            where a sample has none.
        skips: samples left out for the shard's own faults.
    """

    path: Path
    keys: list[str]
    spans: np.ndarray
    skips: list[Skip]


def index_shard(path: Path) -> ShardIndex:
    """Walks the headers of a local tar.

    A sample is left out whole when any of its members is: one that a truncated file cuts off, a name with `..` or an
    absolute one, a link or device, two members of one kind. Where the end-of-archive mark is missing, the last
    sample may lack members and is left out.

    Raises:
        InputError: the file cannot be read, or is compressed.
    """
    samples: dict[str, list[tuple[int, int] | None]] = {}
    faults: dict[str, Reason] = {}
    last = ""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"shard {str(path)!r} cannot be read: {error.strerror}") from None
    try:
        for member in _members(descriptor, path):
            match = _KEY.fullmatch(member.name.removeprefix("./"))
            key, suffix = match.groups() if match else (member.name, "")
            if member.reason is not None:
                torn = member.reason in (Reason.TRUNCATED_SHARD, Reason.BAD_HEADER)
                faults.setdefault(last if torn and not member.name else key, member.reason)
                continue
            if match is None:
                continue
            last = key
            kind = SUFFIXES.get(suffix.lower())
            if kind is None:
                continue
            spans = samples.setdefault(key, [None] * NUM_KINDS)
            if spans[kind] is not None:
                faults.setdefault(key, Reason.DUPLICATE_KEY)
            spans[kind] = member.offset, member.size
    except IsADirectoryError:
        raise InputError(f"shard {str(path)!r} is a folder") from None
    finally:
        os.close(descriptor)
    keys = [key for key in samples if key not in faults]
    spans_array = np.array([[span or (-1, 0) for span in samples[key]] for key in keys], dtype=np.int64)
    skips = [Skip(str(path), key, reason) for key, reason in faults.items()]
    return ShardIndex(path, keys, spans_array.reshape(len(keys), NUM_KINDS, 2), skips)


class _Member(NamedTuple):
    name: str
    offset: int = 0
    size: int = 0
    reason: Reason | None = None  # why it must not be used


def _members(descriptor: int, path: Path) -> Iterator[_Member]:
    """Regular files of a tar, and what is wrong with it; a fault of no known member has the name ""."""
    end = os.fstat(descriptor).st_size
    offset = 0
    long_name: str | None = None
    long_size: int | None = None
    while True:
        header = os.pread(descriptor, _BLOCK, offset)
        if offset == 0 and header.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
            raise InputError(f"shard {str(path)!r} is compressed and cannot be read by offset; decompress it first")
        if len(header) < _BLOCK:
            yield _Member("", reason=Reason.TRUNCATED_SHARD)
            return
        if not header.strip(b"\0"):
            return
        try:
            checksum = _number(header[148:156])
            size = _number(header[124:136])
        except ValueError:
            checksum = size = -1
        if checksum != sum(header) - sum(header[148:156]) + 8 * 32 or size < 0:
            yield _Member("", reason=Reason.BAD_HEADER)
            return
        kind = header[156:157]
        data = offset + _BLOCK
        if kind in b"LKxg":  # GNU long name, GNU long link, pax header of the next member, pax header of all
            if data + size > end:
                yield _Member("", reason=Reason.TRUNCATED_SHARD)
                return
            if size > 2**20:
                yield _Member("", reason=Reason.BAD_HEADER)
                return
            text = os.pread(descriptor, size, data)
            if kind == b"L":
                long_name = _text(text)
            elif kind == b"x":
                try:
                    records = _pax(text)
                    long_name = records.get("path", long_name)
                    long_size = int(records["size"]) if "size" in records else None
                except ValueError:
                    yield _Member("", reason=Reason.BAD_HEADER)
                    return
            offset = data + _padded(size)
            continue
        name = _text(header[:100])
        if header[257:263] == b"ustar\0" and header[345]:
            name = f"{_text(header[345:500])}/{name}"
        name, size = long_name or name, size if long_size is None else long_size
        long_name = long_size = None
        regular = kind in (b"0", b"\0", b"7")
        if kind == b"5" or (regular and name.endswith("/")):
            offset = data
            continue
        if not regular or name.startswith("/") or ".." in name.split("/"):
            yield _Member(name, reason=Reason.UNSAFE_MEMBER)
            offset = data + (0 if kind in b"12346" else _padded(size))  # links and devices have no data
            continue
        if data + size > end:
            yield _Member(name, reason=Reason.TRUNCATED_SHARD)
            return
        yield _Member(name, data, size)
        offset = data + _padded(size)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _number(field: bytes) -> int:
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0")[0].strip() or b"0", 8)


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "backslashreplace")


def _pax(data: bytes) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE\\n` of a pax header."""
    records = {}
    while data:
        length = int(data.split(b" ", 1)[0])
        record, data = data[:length], data[length:]
        key, separator, value = record.split(b" ", 1)[-1].partition(b"=")
        if length < 5 or not separator:
            raise ValueError("not a pax record")
        records[_text(key)] = _text(value.rstrip(b"\n"))
    return records


class Shards:
    """Indexed local shards, read by (shard, row, kind); it may be shared by forked and spawned processes."""

    def __init__(self, indexes: Sequence[ShardIndex]) -> None:
        self.indexes = list(indexes)
        self._files: OrderedDict[int, int] = OrderedDict()

    def key(self, shard: int, row: int) -> str:
        return self.indexes[shard].keys[row]

    def read(self, shard: int, row: int, kind: int) -> bytes | None:
        """The bytes of one member, or None where the sample has none.

        Raises:
            Unusable: the file is gone or shorter than when it was indexed, or the disk fails.
        """
        offset, length = (int(value) for value in self.indexes[shard].spans[row, kind])
        if offset < 0:
            return None
        try:
            data = os.pread(self._file(shard), length, offset)
        except OSError:
            raise Unusable(Reason.UNREADABLE_SHARD) from None
        if len(data) < length:
            raise Unusable(Reason.TRUNCATED_SHARD)
        return data

    def _file(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            self._files[shard] = os.open(self.indexes[shard].path, os.O_RDONLY)
            if len(self._files) > _MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        return self._files[shard]

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {"indexes": self.indexes, "_files": OrderedDict()}

    def __del__(self) -> None:
        self.close()


class ShardWriter:
    """Writes `PREFIX-00000.tar`, `PREFIX-00001.tar`, …; each appears under its name when it is whole.

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

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Adds a sample: suffix to bytes."""
        from webdataset.writer import TarWriter

        if self._tar is None:
            self._file = self._partial().open("wb")
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
                self._partial().unlink()
                self._tar = self._file = None

    def _partial(self) -> Path:
        return self.folder / f"{self.prefix}-{len(self.paths):05d}.tar.partial"

    def _finish(self) -> None:
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        partial = self._partial()
        path = partial.with_suffix("")
        os.replace(partial, path)
        self.paths.append(path)
        self._tar = self._file = None
