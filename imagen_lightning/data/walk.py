"""From a tar's members to samples: their kinds, spans, keys and SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from array import array
from collections import Counter
from collections.abc import Sequence
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
    "png": IMAGE,
    "webp": IMAGE,
    "txt": CAPTION,
    "json": METADATA,
    "text.npz": TEXT_STATES,
}

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


def walk(descriptor: int, path: str) -> tuple[Arrays, dict[str, Reason], dict[str, int]]:
    """The samples of a tar, without SHA-256, the faults by key, and the number of members by suffix.

    Raises:
        InputError: the tar is compressed.
        OSError: it cannot be read.
    """
    rows: dict[str, int] = {}
    spans = array("q")
    faults: dict[str, Reason] = {}
    suffixes: list[str] = []
    last, row = "", -1
    for run in members(descriptor, path):
        if run.reason is not None:
            name = run.names[0]
            torn = run.reason in (Reason.TRUNCATED_SHARD, Reason.BAD_HEADER)
            faults.setdefault(last if torn and not name else _split(name)[0] or name, run.reason)
            continue
        for name, offset, size in zip(run.names, run.offsets, run.sizes):
            key, _, suffix = name.partition(".")
            if not key or not suffix or "/" in name:
                key, suffix = _split(name)
                if not key:
                    continue
            suffixes.append(suffix)
            if key != last:
                last, row = key, rows.get(key, -1)
            kind = SUFFIXES.get(suffix)
            if kind is None and (kind := SUFFIXES.get(suffix.lower())) is None:
                continue
            if row < 0:
                row = rows[key] = len(rows)
                spans.extend(_ABSENT)
            place = 2 * (NUM_KINDS * row + kind)
            if spans[place] >= 0:
                faults.setdefault(key, Reason.DUPLICATE_KEY)
            spans[place] = offset
            spans[place + 1] = size
    keys = [key.encode() for key in rows if key not in faults]
    good = np.ones(len(rows), dtype=bool)
    good[[rows[key] for key in faults if key in rows]] = False
    ends = np.cumsum(np.fromiter(map(len, keys), np.int64, len(keys)))
    text = np.frombuffer(b"".join(keys), np.uint8)
    table = np.frombuffer(spans, np.int64).reshape(-1, NUM_KINDS, 2) if spans else np.zeros((0, NUM_KINDS, 2), np.int64)
    counts: Counter[str] = Counter()
    for suffix, count in Counter(suffixes).items():
        counts[suffix.lower()] += count
    return Arrays(table[good], text, ends), faults, dict(counts.most_common())


def _split(name: str) -> tuple[str, str]:
    """`FOLDER/KEY.suffix` to key (with the folder) and suffix; ("", "") for names that are no sample's member."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    key, _, suffix = base.partition(".")
    return (f"{folder}{slash}{key}", suffix) if key and suffix else ("", "")


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
