"""From a tar's members to samples: their kinds, spans, keys and SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np

from imagen_lightning.data.skips import Reason
from imagen_lightning.data.tar import members

IMAGE, CAPTION, METADATA, TEXT_STATES = range(4)
NUM_KINDS = 4
SUFFIXES = {
    "jpg": IMAGE,
    "jpeg": IMAGE,
    "jpe": IMAGE,
    "jfif": IMAGE,
    "png": IMAGE,
    "webp": IMAGE,
    "txt": CAPTION,
    "json": METADATA,
    "text.npz": TEXT_STATES,
}
OTHER_IMAGES = frozenset({"bmp", "dib", "gif", "pbm", "pgm", "pnm", "ppm", "tga", "tif", "tiff"}).union(
    {"avif", "dng", "exr", "heic", "heif", "ico", "j2k", "jp2", "jxl", "pcx", "psd", "svg"}
)
"""Suffixes of images in formats that shards are not read in."""

NO_KEY = "not KEY.suffix"
"""What members are counted under whose names are not of this form."""

_ABSENT = array("q", [-1, 0] * NUM_KINDS)
_MEMBER_HEAD = struct.Struct("<BQ")
_WINDOW = 2**19  # bytes read at once to be hashed: they stay in the processor's cache
_HASHED_TOGETHER = 256  # samples
_NUM_FIELD_SAMPLES = 16
_MAX_FIELD_BYTES = 2**20


class Arrays(NamedTuple):
    """What an index holds of each sample; n samples.

    Attributes:
        spans: (n, 4, 2) int64, offset and length of each kind of member; offset -1 where there is none.
        key_text: UTF-8 bytes of the keys, uint8.
        key_ends: (n,) int64.
        sha256: (n, 32) uint8, or None.
    """

    spans: np.ndarray
    key_text: np.ndarray
    key_ends: np.ndarray
    sha256: np.ndarray | None = None


class _Odd(NamedTuple):
    """A member that is not simply one of a known suffix."""

    name: str
    key: str
    suffix: str
    offset: int
    size: int
    reason: Reason | None


def walk(descriptor: int, path: str) -> tuple[Arrays, dict[str, Reason], dict[str, int]]:
    """Return the samples of a tar, without SHA-256, the faults by key, and the number of members by suffix.

    A key ends at the first dot of a member's name. Where what follows is not known but ends in a known suffix, as in
    `KEY.hd.jpg`, the member is one of the sample `KEY.hd`, if that has an image and a caption or if there is no sample
    `KEY`; otherwise it is a further member of `KEY`, not read, and counted as `hd.jpg`.

    Raises:
        InputError: the tar is compressed.
        OSError: it cannot be read.
    """
    rows: dict[str, int] = {}
    spans = array("q")
    faults: dict[str, Reason] = {}
    suffixes: list[str] = []
    odd: list[_Odd] = []
    last, row = "", -1
    for run in members(descriptor, path):
        for name, offset, size in zip(run.names, run.offsets, run.sizes):
            key, _, suffix = name.partition(".")
            if not key or not suffix or "/" in name:
                key, suffix = split_name(name)
            kind = SUFFIXES.get(suffix)
            if kind is None or run.reason is not None:
                more, tail = split_suffix(suffix)
                kind = SUFFIXES.get(tail)
                if more or kind is None or run.reason is not None:
                    odd.append(_Odd(name, key if name else last, suffix, offset, size, run.reason))
                    last = f"{key}.{more}" if more and kind is not None else last
                    continue
                suffix = tail
            suffixes.append(suffix)
            if key != last:
                last, row = key, rows.get(key, -1)
            if row < 0:
                row = rows[key] = len(rows)
                spans.extend(_ABSENT)
            place = 2 * (NUM_KINDS * row + kind)
            if spans[place] >= 0:
                faults.setdefault(key, Reason.DUPLICATE_KEY)
            spans[place] = offset
            spans[place + 1] = size
    counts = Counter(suffixes)
    counts.update(_sort_out(odd, rows, spans, faults))
    keys = [key.encode() for key in rows if key not in faults]
    good = np.ones(len(rows), dtype=bool)
    good[[rows[key] for key in faults if key in rows]] = False
    ends = np.cumsum(np.fromiter(map(len, keys), np.int64, len(keys)))
    text = np.frombuffer(b"".join(keys), np.uint8)
    table = np.frombuffer(spans, np.int64).reshape(-1, NUM_KINDS, 2) if spans else np.zeros((0, NUM_KINDS, 2), np.int64)
    return Arrays(table[good], text, ends), faults, dict(counts.most_common())


def _sort_out(odd: Sequence[_Odd], rows: dict[str, int], spans: array[int], faults: dict[str, Reason]) -> Iterator[str]:
    """Give the remaining members to samples and faults, and yield the suffix under which each is counted."""
    dotted: dict[tuple[str, str], list[tuple[str, _Odd]]] = {}
    others: list[tuple[str, str, str, str]] = []
    for member in odd:
        more, tail = split_suffix(member.suffix)
        full = f"{member.key}.{more}" if more else member.key
        if more and tail in SUFFIXES:
            dotted.setdefault((member.key, full), []).append((tail, member))
        elif member.reason is not None:
            faults.setdefault(member.key or member.name, member.reason)
        else:
            others.append((member.key, full, member.suffix.lower(), tail))
    for (key, full), parts in dotted.items():
        if key in rows and not is_whole(SUFFIXES[tail] for tail, member in parts if member.reason is None):
            reasons = [faults.pop(full, None), *(member.reason for _, member in parts)]
            reason = next(filter(None, reasons), None)
            if reason is not None:
                faults.setdefault(key, reason)
            yield from (member.suffix.lower() for _, member in parts if member.reason is None)
            continue
        for tail, member in parts:
            if member.reason is not None:
                faults.setdefault(full, member.reason)
                continue
            yield tail
            if full not in rows:
                rows[full] = len(rows)
                spans.extend(_ABSENT)
            place = 2 * (NUM_KINDS * rows[full] + SUFFIXES[tail])
            if spans[place] >= 0:
                faults.setdefault(full, Reason.DUPLICATE_KEY)
            spans[place : place + 2] = array("q", [member.offset, member.size])
    for key, full, suffix, tail in others:
        yield (tail if full in rows else suffix) if key else NO_KEY
        if tail not in OTHER_IMAGES or not key:
            continue
        if full in rows:
            if spans[2 * (NUM_KINDS * rows[full] + IMAGE)] < 0:
                faults.setdefault(full, Reason.OTHER_FORMAT)
        elif key not in rows:
            faults.setdefault(full, Reason.OTHER_FORMAT)


def is_whole(kinds: Iterable[int]) -> bool:
    """Return whether members of these kinds make a sample: an image and a caption."""
    there = set(kinds)
    return IMAGE in there and bool(there & {CAPTION, METADATA})


def split_name(name: str) -> tuple[str, str]:
    """`FOLDER/KEY.suffix` to key (with the folder) and suffix; ("", "") for names that are no sample's member."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    key, _, suffix = base.partition(".")
    return (f"{folder}{slash}{key}", suffix) if key and suffix else ("", "")


def split_suffix(suffix: str) -> tuple[str, str]:
    """`hd.JPG` to what belongs to a longer key and the suffix proper in lower case: ("hd", "jpg")."""
    lower = suffix.lower()
    tail = "text.npz" if lower.endswith(".text.npz") or lower == "text.npz" else lower.rpartition(".")[2]
    return suffix[: -len(tail)].rstrip(".") if tail else "", tail


def json_fields(descriptor: int, spans: np.ndarray) -> list[str]:
    """Names of the fields of json members; of a few samples, evenly spaced."""
    names: set[str] = set()
    rows = np.flatnonzero((spans[:, METADATA, 0] >= 0) & (spans[:, METADATA, 1] <= _MAX_FIELD_BYTES))
    for row in rows[:: max(1, -(-len(rows) // _NUM_FIELD_SAMPLES))]:
        offset, length = spans[row, METADATA].tolist()
        try:
            record = json.loads(os.pread(descriptor, length, offset))
        except (ValueError, RecursionError):  # a fault of the sample, named when it is read
            record = None
        names.update(record if isinstance(record, dict) else ())
    return sorted(names)


def hash_samples(descriptor: int, spans: np.ndarray) -> np.ndarray:
    """(n, 32) uint8: of each sample the SHA-256 over its members in the order of their kinds, each after its kind
    (one byte) and its length (eight, little-endian), so that members cannot trade bytes."""
    parts = [spans[start : start + _HASHED_TOGETHER] for start in range(0, len(spans), _HASHED_TOGETHER)]
    if len(parts) < 2:
        digests = [_hash_part(descriptor, part) for part in parts]
    else:
        with ThreadPoolExecutor(2) as pool:  # hashlib and preadv let go of the interpreter: one reads, one hashes
            digests = list(pool.map(partial(_hash_part, descriptor), parts))
    return np.frombuffer(b"".join(digests), np.uint8).reshape(len(spans), 32)


def _hash_part(descriptor: int, spans: np.ndarray) -> bytearray:
    view = memoryview(bytearray(_WINDOW))
    begin = end = 0  # the part of the file that the view holds
    digests = bytearray()
    for sample in spans.tolist():
        present = [(kind, offset, length) for kind, (offset, length) in enumerate(sample) if offset >= 0]
        first = min((offset for _, offset, _ in present), default=0)
        stop = max((offset + length for _, offset, length in present), default=0)
        near = stop - first <= _WINDOW
        if near and not begin <= first <= stop <= end:
            begin, end = first, first + os.preadv(descriptor, [view], first)
        digest = hashlib.sha256()
        for kind, offset, length in present:
            digest.update(_MEMBER_HEAD.pack(kind, length))
            if near:
                digest.update(view[offset - begin : max(0, min(offset + length, end) - begin)])
            else:
                for place in range(offset, offset + length, _WINDOW):
                    digest.update(os.pread(descriptor, min(_WINDOW, offset + length - place), place))
        digests += digest.digest()
    return digests


def hash_sample(members: Sequence[bytes | None]) -> bytes:
    """The SHA-256 of one sample's members by kind, as `hash_samples` takes it."""
    digest = hashlib.sha256()
    for kind, data in enumerate(members):
        if data is not None:
            digest.update(_MEMBER_HEAD.pack(kind, len(data)))
            digest.update(data)
    return digest.digest()
