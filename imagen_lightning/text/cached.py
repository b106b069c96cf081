"""Text states in a file: written once by an encoder, read one caption at a time in its place.

The file is a safetensors file, of n different captions with T tokens in all:

| tensor | type | content |
| --- | --- | --- |
| `offsets` | (n+1,) int64 | the states of caption i are rows offsets[i] to offsets[i+1]-1 |
| `scales` | (T,) float32 | of int8 states alone: a state is its row times its scale |
| `states` | (T, D) float16 or int8 | one row a real token; padding is not stored |
| `captions` | (n, 16) uint8 | the first half of the SHA-256 of the caption in UTF-8, in ascending order |

Its metadata says of which encoder the states are (`TextEncoder.identity`), and `mask`: "tokens", or "none" where the
encoder gives no mask.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from imagen_lightning.io.atomic import is_temporary, temporary_path
from imagen_lightning.text.common import masked_mean
from imagen_lightning.types import InputError, Text

FORMAT = "imagen-lightning text states"
VERSION = "1"
SUFFIX = ".safetensors"
DTYPES = ("float16", "int8")

_DIGEST = 16
_NAMES = {"float16": "F16", "int8": "I8"}
_TYPES: dict[str, np.dtype[Any]] = {
    "I64": np.dtype("<i8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}
_MAX_HEADER = 2**20


def caption_digest(caption: str) -> bytes:
    """The 16 bytes under which a caption's states are stored."""
    return hashlib.sha256(caption.encode("utf-8", errors="replace")).digest()[:_DIGEST]


def stored_bytes(num_captions: int, num_tokens: int, dim: int, dtype: str) -> int:
    """Size in bytes of a file's tensors; its header is some thousand bytes more."""
    token = 2 * dim if dtype == "float16" else dim + 4
    return num_tokens * token + num_captions * (_DIGEST + 8) + 8


def quantize(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """States (L, D) float32 as int8, and a scale (L,) float32 a token: 127 times that is its largest absolute value."""
    scales = (np.abs(states).max(axis=1) / 127).astype(np.float32)
    safe = np.where(scales > 0, scales, 1)
    return np.clip(np.rint(states / safe[:, None]), -127, 127).astype(np.int8), scales


def dequantize(states: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The float32 states (L, D) of int8 ones and their scales (L,)."""
    return states.astype(np.float32) * scales[:, None]


class StatesWriter:
    """Writes a file of text states in whatever order they come, whole or not at all: leaving the context finishes it.

    Several processes may write one file: the last to finish counts. What a killed one left is removed.

    Args:
        path: the file; it appears under this name when it is whole.
        num_tokens: each caption's number of states; as many must be written.
        dim: D.
        dtype: "float16" or "int8".
        metadata: strings kept with the states, `mask` among them.

    Raises:
        InputError: states that are not finite, or too large for float16.
        OSError: the file cannot be written; nothing is left of it.
    """

    def __init__(
        self, path: Path, num_tokens: Mapping[str, int], dim: int, dtype: str, metadata: Mapping[str, str]
    ) -> None:
        self.path = path
        self.dim = dim
        self.dtype = dtype
        lengths = {caption_digest(caption): count for caption, count in num_tokens.items()}
        self._digests = sorted(lengths)
        self._offsets = np.cumsum([0, *(lengths[digest] for digest in self._digests)], dtype="<i8")
        self._rows = dict(zip(self._digests, zip(self._offsets[:-1].tolist(), self._offsets[1:].tolist())))
        self._left = set(self._digests)
        total = int(self._offsets[-1])
        shapes: dict[str, tuple[str, list[int]]] = {"offsets": ("I64", [len(self._offsets)])}
        if dtype == "int8":
            shapes["scales"] = ("F32", [total])
        shapes["states"] = (_NAMES[dtype], [total, dim])
        shapes["captions"] = ("U8", [len(self._digests), _DIGEST])
        self._header, self._starts = _layout(shapes, {"format": FORMAT, "version": VERSION, "dtype": dtype, **metadata})
        self._temporary = temporary_path(path)
        self._file = -1

    def __enter__(self) -> StatesWriter:
        for path in self.path.parent.glob(f".{glob.escape(self.path.name)}.*"):
            if is_temporary(path):
                _remove_abandoned(path)
        while not self._temporary.exists():  # another process may remove it before it is locked
            self._file = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            fcntl.flock(self._file, fcntl.LOCK_SH)
        try:
            self._put(0, self._header)
            self._put(self._starts["offsets"], self._offsets.tobytes())
            self._put(self._starts["captions"], b"".join(self._digests))
        except OSError:
            self._discard()
            raise
        return self

    def write(self, captions: Sequence[str], text: Text) -> None:
        """Adds B captions' states."""
        states = text.states.float().cpu().numpy()
        masks = np.ones(states.shape[:2], dtype=bool) if text.mask is None else text.mask.cpu().numpy()
        for caption, rows, mask in zip(captions, states, masks):
            digest = caption_digest(caption)
            begin, end = self._rows[digest]
            rows = rows[mask]
            if rows.shape != (end - begin, self.dim):
                raise RuntimeError(f"caption {caption!r} has states {rows.shape}, not {(end - begin, self.dim)}")
            self._put_rows(caption, begin, rows)
            self._left.discard(digest)

    def _put_rows(self, caption: str, begin: int, rows: np.ndarray) -> None:
        if not np.isfinite(rows).all():
            raise InputError(f"the text encoder gives NaN or infinite states for caption {_short(caption)}")
        if self.dtype == "int8":
            stored, scales = quantize(rows)
            self._put(self._starts["scales"] + 4 * begin, scales.astype("<f4").tobytes())
            self._put(self._starts["states"] + self.dim * begin, stored.tobytes())
            return
        largest = float(np.abs(rows).max(initial=0))
        if largest > float(np.finfo(np.float16).max):
            raise InputError(
                f"a text state of {largest:g} is too large for float16 (caption {_short(caption)}); store int8"
            )
        self._put(self._starts["states"] + 2 * self.dim * begin, rows.astype("<f2").tobytes())

    def _put(self, offset: int, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                count = os.pwrite(self._file, view, offset)
                view, offset = view[count:], offset + count
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._discard()
            return
        try:
            if self._left:
                raise RuntimeError(f"{len(self._left)} captions of {self.path} were not written")
            os.fsync(self._file)
            os.replace(self._temporary, self.path)
        except (OSError, RuntimeError):
            self._discard()
            raise
        os.close(self._file)

    def _discard(self) -> None:
        self._temporary.unlink(missing_ok=True)
        os.close(self._file)


def _remove_abandoned(path: Path) -> None:
    """Remove a temporary file that no process writes any more."""
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except (FileNotFoundError, BlockingIOError):
        return


class StatesFile:
    """A file of text states, read by offset, a caption at a time; it may be shared by forked and spawned processes.

    Only its header is read until a caption is asked for; then the table of captions as well, 24 bytes each.

    Attributes:
        path: the file.
        metadata: its strings.
        dim: D.
        num_captions: n.

    Raises:
        InputError: it cannot be read, is no such file, is of a later format, or lacks its end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                header = file.read(length) if length <= min(_MAX_HEADER, size) else b""
        except OSError as error:
            raise InputError(f"stored text states {str(path)!r} cannot be read: {error.strerror}") from None
        try:
            tensors = json.loads(header)
            self.metadata: dict[str, str] = tensors.pop("__metadata__")
            spans = {name: _span(8 + length, tensor) for name, tensor in tensors.items()}
            (n, width), (total, dim) = spans["captions"][1], spans["states"][1]
            fits = self.metadata["format"] == FORMAT and width == _DIGEST and spans["offsets"][1] == (n + 1,)
            fits = fits and (self.metadata["dtype"] == "float16" or spans["scales"][1] == (total,))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            fits = False
        if not fits:
            raise InputError(f"{str(path)!r} holds no text states of `imagen-lightning shards embed`")
        if self.metadata.get("version") != VERSION:
            raise InputError(
                f"stored text states {str(path)!r} are of format {self.metadata.get('version')!r}; this version reads "
                f"{VERSION!r}: store them anew, or use a newer imagen-lightning"
            )
        if max(stop for _, _, _, stop in spans.values()) != size:
            raise InputError(f"stored text states {str(path)!r} are truncated; delete the file and store them anew")
        self.dim = dim
        self.num_captions = n
        self._spans = spans
        self._file: int | None = None
        self._captions = np.zeros(0, dtype=f"S{_DIGEST}")
        self._offsets = np.zeros(1, dtype=np.int64)

    def read(self, caption: str) -> Text | None:
        """The caption's states as a batch of one, float32, as its encoder gives them alone; None where it has none.

        Raises:
            OSError: the file has gone, is shorter than it was, or the disk fails.
        """
        if self._file is None:
            self._open()
        digest = np.array(caption_digest(caption), dtype=self._captions.dtype)
        number = int(np.searchsorted(self._captions, digest))
        if number == self.num_captions or self._captions[number] != digest:
            return None
        begin, end = self._offsets[number : number + 2].tolist()
        rows = self._rows("states", begin, end)
        if self.metadata["dtype"] == "int8":
            rows = dequantize(rows, self._rows("scales", begin, end))
        states = torch.from_numpy(rows.astype(np.float32))[None]
        mask = None if self.metadata.get("mask") == "none" else torch.ones(states.shape[:2], dtype=torch.bool)
        return Text(states, mask, masked_mean(states, mask))

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_RDONLY)
        self._captions = self._rows("captions", 0, self.num_captions).view(f"S{_DIGEST}").reshape(-1)
        self._offsets = self._rows("offsets", 0, self.num_captions + 1)

    def _rows(self, name: str, begin: int, end: int) -> np.ndarray:
        """Rows begin to end-1 of a tensor."""
        assert self._file is not None
        kind, shape, start, _ = self._spans[name]
        row = kind.itemsize * math.prod(shape[1:])
        data = os.pread(self._file, row * (end - begin), start + row * begin)
        if len(data) < row * (end - begin):
            raise OSError(f"{self.path} is shorter than it was")
        return np.frombuffer(data, dtype=kind).reshape(end - begin, *shape[1:])

    def close(self) -> None:
        """Gives the open file and its table back; reading opens it again."""
        if self._file is not None:
            os.close(self._file)
        self._file = None
        self._captions, self._offsets = self._captions[:0], self._offsets[:1]

    def __getstate__(self) -> dict[str, Any]:
        empty = {"_captions": self._captions[:0].copy(), "_offsets": self._offsets[:1].copy()}
        return {**self.__dict__, "_file": None, **empty}

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self.close()


def _layout(shapes: Mapping[str, tuple[str, list[int]]], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file, and where each of its tensors begins."""
    tensors: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    starts = {}
    for name, (kind, shape) in shapes.items():
        end = begin + _TYPES[kind].itemsize * math.prod(shape)
        tensors[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
        starts[name], begin = begin, end
    text = json.dumps(tensors, ensure_ascii=False).encode("utf-8", errors="replace")
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return header, {name: len(header) + start for name, start in starts.items()}


def _span(base: int, tensor: Mapping[str, Any]) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    """A tensor's type and shape, and where its bytes begin and end in the file."""
    kind, shape = _TYPES[tensor["dtype"]], tuple(int(size) for size in tensor["shape"])
    begin, end = tensor["data_offsets"]
    if min(shape) < 0 or begin < 0 or end - begin != kind.itemsize * math.prod(shape):
        raise ValueError("shape and bytes do not agree")
    return kind, shape, base + begin, base + end


def _short(caption: str, length: int = 60) -> str:
    return repr(caption if len(caption) <= length else caption[:length] + "…")
