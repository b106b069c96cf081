"""The members of a tar by their headers alone: where each lies, and what is wrong with it.

`members` reads plain headers many at a time and checks them with numpy; whatever is out of the ordinary (pax and GNU
headers, long or unsafe names, links, damage, the end) goes through `exact_members`, which reads one at a time. Both
give the same. The file is read by `pread`, never mapped: a mapped file that another process cuts kills its reader.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from imagen_lightning.data.skips import Reason
from imagen_lightning.errors import InputError

_BLOCK = 512
_BATCH = 8192  # headers that are checked together
_EXACT_RUN = 256  # members read one at a time before plain ones are tried again
_MIN_WINDOW, _MAX_WINDOW = 2**12, 2**22  # bytes of one read
_MAX_LONG_HEADER = 2**20
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


class Members(NamedTuple):
    """Regular files of a tar, one after the other; or one fault.

    Attributes:
        names: their names; "" for damage that hides it.
        offsets: where the data of each begins.
        sizes: bytes of the data of each.
        reason: why it must not be used, or None.
        next: where the next header is; -1 where nothing follows.
    """

    names: list[str]
    offsets: list[int]
    sizes: list[int]
    reason: Reason | None
    next: int


def _fault(name: str, reason: Reason, next_: int = -1) -> Members:
    return Members([name], [0], [0], reason, next_)


def members(descriptor: int, path: str) -> Iterator[Members]:
    """Regular files of a tar, and its faults; it ends at the first fault that hides what follows.

    Args:
        descriptor: the open file.
        path: its name, for messages.

    Raises:
        InputError: the tar is compressed.
        OSError: the file cannot be read.
    """
    if os.pread(descriptor, 8, 0).startswith(_COMPRESSED):
        raise InputError(f"shard {path!r} is compressed and cannot be read by offset; decompress it first")
    end = os.fstat(descriptor).st_size
    offset = 0
    while offset >= 0:
        for run in plain_members(descriptor, offset, end):
            offset = run.next
            yield run
        offset, begin = -1, offset
        for run in islice(exact_members(descriptor, begin), _EXACT_RUN):
            offset = run.next
            yield run


def plain_members(descriptor: int, offset: int, end: int) -> Iterator[Members]:
    """Plain members from an offset on, up to the first that is not; at most _BATCH at a time."""
    while True:
        headers, offsets, sizes = _follow(descriptor, offset, end)
        fields = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, _BLOCK)
        num = int(np.argmin(np.append(_plain_numbers(fields) & _plain_names(fields[:, :100]), False)))
        if num:
            offset = offsets[num - 1] + _padded(sizes[num - 1])
            yield Members(_names(fields[:num]), offsets[:num], sizes[:num], None, offset)
        if num < _BATCH:
            return


def _follow(descriptor: int, offset: int, end: int) -> tuple[list[bytes], list[int], list[int]]:
    """Up to _BATCH headers, as far as their sizes lead on, and the offsets and sizes of the data; none is checked."""
    headers: list[bytes] = []
    starts: list[int] = []
    sizes: list[int] = []
    buffer = b""
    begin = before = 0
    while len(headers) < _BATCH:
        place = offset - begin
        if place + _BLOCK > len(buffer):
            window = 4096 * (len(headers) - before)  # by the number of headers that the last one held
            before = len(headers)
            buffer = os.pread(descriptor, min(max(window, _MIN_WINDOW), _MAX_WINDOW), offset)
            begin, place = offset, 0
        header = buffer[place : place + _BLOCK]
        try:
            size = int(header[124:135], 8)
        except ValueError:
            break
        start = offset + _BLOCK
        if size < 0 or start + size > end or len(header) < _BLOCK:
            break
        headers.append(header)
        starts.append(start)
        sizes.append(size)
        offset = start + _padded(size)
    return headers, starts, sizes


def _plain_numbers(headers: np.ndarray) -> np.ndarray:
    """(n,) bool: headers (n, 512) of regular files without prefix, with plain numbers and the right checksum."""
    checksum, size, kind = headers[:, 148:156], headers[:, 124:136], headers[:, 156]
    expected = headers.sum(1, dtype=np.int64) - checksum.sum(1, dtype=np.int64) + 8 * 32
    stored = (checksum[:, :6].astype(np.int64) - 48) @ (8 ** np.arange(5, -1, -1))
    plain = np.equal(stored, expected) & (checksum[:, 6] == 0) & (checksum[:, 7] == 32)
    plain &= _octal(checksum[:, :6]) & _octal(size[:, :11]) & ((size[:, 11] == 0) | (size[:, 11] == 32))
    plain &= ((kind == 48) | (kind == 0)) & (headers[:, 345] == 0)
    return plain


def _octal(digits: np.ndarray) -> np.ndarray:
    return np.logical_and.reduce((digits >= 48) & (digits < 56), axis=1)


def _plain_names(names: np.ndarray) -> np.ndarray:
    """(n,) bool: names (n, 100) with nothing after their end, no `..`, and no slash first or last."""
    slash, dot, end = names == 47, names == 46, names == 0
    odd = (dot[:, 1:] & dot[:, :-1]) | (end[:, :-1] & ~end[:, 1:]) | (slash[:, :-1] & end[:, 1:])
    return ~(odd.any(1) | slash[:, 0] | slash[:, -1])


def _names(headers: np.ndarray) -> list[str]:
    names = np.ascontiguousarray(headers[:, :100]).view("S100")[:, 0].tolist()
    return b"\0".join(names).decode("utf-8", "backslashreplace").split("\0")


def exact_members(descriptor: int, offset: int = 0) -> Iterator[Members]:
    """What `members` gives, from the header at `offset` on, one header at a time."""
    end = os.fstat(descriptor).st_size
    long_name: str | None = None
    long_size: int | None = None
    while True:
        header = os.pread(descriptor, _BLOCK, offset)
        if len(header) < _BLOCK:
            yield _fault("", Reason.TRUNCATED_SHARD)
            return
        if not header.strip(b"\0"):
            return
        try:
            checksum = _number(header[148:156])
            size = _number(header[124:136])
        except ValueError:
            checksum = size = -1
        if checksum != sum(header) - sum(header[148:156]) + 8 * 32 or size < 0:
            yield _fault("", Reason.BAD_HEADER)
            return
        kind = header[156:157]
        data = offset + _BLOCK
        if kind in b"LKxg":  # GNU long name, GNU long link, pax header of the next member, pax header of all
            if data + size > end:
                yield _fault("", Reason.TRUNCATED_SHARD)
                return
            if size > _MAX_LONG_HEADER:
                yield _fault("", Reason.BAD_HEADER)
                return
            text = os.pread(descriptor, size, data)
            if kind == b"L":
                long_name = _text(text)
            elif kind == b"x":
                try:
                    records = _pax(text)
                    long_name = records.get("path", long_name)
                    long_size = int(records["size"]) if "size" in records else None
                    if (long_size or 0) < 0:
                        raise ValueError("negative size")
                except ValueError:
                    yield _fault("", Reason.BAD_HEADER)
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
            offset = data + (0 if kind in b"12346" else _padded(size))  # links and devices have no data
            yield _fault(name, Reason.UNSAFE_MEMBER, offset)
            continue
        if data + size > end:
            yield _fault(name, Reason.TRUNCATED_SHARD)
            return
        offset = data + _padded(size)
        yield Members([name], [data], [size], None, offset)


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
