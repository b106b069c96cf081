"""Safetensors files, read and written one tensor at a time.

Nothing is mapped into memory and nothing is held twice: reading a file needs its tensors' size and the largest of them
once more, writing one the largest alone. Both hash the file as they go.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from imagen_lightning.cascade.local import first_line
from imagen_lightning.types import InputError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file's header has it: its type, shape, and where its bytes begin among the tensors'."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, in the order in which they lie there.

    Raises:
        InputError: a file that is damaged, or that holds numbers of a type unknown here.
    """
    try:
        with safe_open(path, framework="pt"):  # which checks that the tensors fill the file, without holes
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"weights {str(path)!r} are damaged ({first_line(error)}); copy the cascade again") from error
    with path.open("rb") as file:
        entries = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    entries.pop("__metadata__", None)
    for key, entry in entries.items():
        if entry["dtype"] not in DTYPES:
            raise InputError(
                f"weights {str(path)!r}: {key!r} is of type {entry['dtype']}; use one of {', '.join(DTYPES)}"
            )
    stored = [
        (key, StoredTensor(DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"][0]))
        for key, entry in entries.items()
    ]
    return dict(sorted(stored, key=lambda pair: (pair[1].begin, pair[1].num_bytes)))


def read_tensors(path: Path, header: Mapping[str, StoredTensor], digest: Any) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the file in turn, on the CPU; all bytes of the file pass through `digest.update`.

    Args:
        path: of the file.
        header: as `read_header` gives it.
        digest: of `hashlib`.

    Raises:
        InputError: the file ends before its header says so, or goes on beyond.
    """
    with path.open("rb", buffering=0) as file:
        start = file.read(8)
        digest.update(start)
        digest.update(_read(file, int.from_bytes(start, "little"), path).numpy())
        for key, stored in header.items():
            raw = _read(file, stored.num_bytes, path)
            digest.update(raw.numpy())
            yield key, raw.view(stored.dtype).view(stored.shape)
        if file.read(1):
            raise InputError(f"weights {str(path)!r} have changed while they were read; load them again")


def _read(file: BinaryIO, num_bytes: int, path: Path) -> Tensor:
    """The next bytes of a file as (num_bytes,) uint8."""
    raw = torch.empty(num_bytes, dtype=torch.uint8)
    left = raw.numpy().data
    while len(left):
        count = file.readinto(left)  # type: ignore[attr-defined]
        if not count:
            raise InputError(f"weights {str(path)!r} have changed while they were read; load them again")
        left = left[count:]
    return raw


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Writes tensors of any device and layout to a new file and returns its SHA-256.

    Raises:
        InputError: numbers of a type that the file cannot hold.
    """
    # Longer numbers first, so that each lies at a multiple of its own length.
    ordered = sorted(tensors.items(), key=lambda pair: (-pair[1].dtype.itemsize, pair[0]))
    header, end = {}, 0
    for key, value in ordered:
        if value.dtype not in _NAMES:
            raise InputError(f"{key!r} is of {value.dtype}, which cannot be saved; use one of {', '.join(DTYPES)}")
        begin, end = end, end + value.numel() * value.dtype.itemsize
        header[key] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("xb", buffering=0) as file:

        def write(data: Any) -> None:
            digest.update(data)
            left = memoryview(data)
            while len(left):
                left = left[file.write(left) :]

        write(len(text).to_bytes(8, "little") + text)
        for _, value in ordered:
            flat = value.detach().contiguous().cpu().flatten()
            write(flat.view(torch.uint8).numpy())
    return digest.hexdigest()
