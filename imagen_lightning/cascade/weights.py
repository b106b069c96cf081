"""A stage's weights in a cascade folder: safetensors, checked by name, shape and SHA-256."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imagen_lightning.cascade.manifest import MANIFEST, read_manifest
from imagen_lightning.cascade.origin import check_record, descended
from imagen_lightning.cascade.sampling import find_stage
from imagen_lightning.cascade.tensors import StoredTensor, read_header, read_tensors, write_tensors
from imagen_lightning.types import InputError

_shapes_only: ContextVar[bool] = ContextVar("shapes_only", default=False)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SHARD_SIZE = 5_000_000_000  # bytes
WORDS = "tokens."  # pseudo-words' vectors, which are float32 whichever type a stage has


def load_weights(stage: nn.Module, reference: str) -> None:
    """Gives a stage the weights of one in a cascade folder, and its origin, and nothing else of it (`init_from`).

    Args:
        stage: of the same architecture.
        reference: "CASCADE#stage", the folder and the stage's name or number: "runs/quickstart/cascade#base".

    Raises:
        InputError: no such cascade or stage, damaged weights, or weights that do not fit.
    """
    path, entry = find_entry(reference, "init_from")
    what = f"stage {entry['name']!r} of {path}"
    record = check_record(entry["weights"].get("record"), what)
    load_stage_weights(stage, path.parent, entry, what)
    stage.origin, stage.weights_record = descended(entry, path), record  # type: ignore[assignment]


def find_entry(reference: str, what: str) -> tuple[Path, dict[str, Any]]:
    """The manifest's path and the stage's part of it that "CASCADE#stage" names.

    Raises:
        InputError: no such cascade or stage.
    """
    folder, separator, name = reference.rpartition("#")
    if not separator:
        raise InputError(f"{what} {reference!r} names no stage; write CASCADE#stage, e.g. {reference}#base")
    path, manifest = read_manifest(folder)
    return path, manifest["stages"][find_stage([entry["name"] for entry in manifest["stages"]], name)]


# ---- reading


def find_dtype(name: str | None) -> torch.dtype | None:
    """The type of that name, None for None.

    Raises:
        InputError: any other name.
    """
    if name is None:
        return None
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is unknown; use one of {', '.join(DTYPES)}, or none for the files' own")
    return DTYPES[name]


def load_stage_weights(
    module: nn.Module,
    folder: Path,
    entry: Mapping[str, Any],
    what: str,
    dtype: str | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Gives a stage its weights from a cascade's folder, one tensor at a time.

    Beyond the stage's own memory this takes that of its largest tensor. A stage that was made with weights keeps its
    type, device and, until the files have been read and found whole, its weights too, which takes its memory twice.

    Args:
        module: the stage, made without weights (`build_stage`) or with them.
        folder: of the cascade.
        entry: the stage's part of the manifest.
        what: names the stage in messages.
        dtype: "float32", "bfloat16" or "float16", to which floating tensors are cast, but for pseudo-words' vectors;
            None keeps the files' own.
        device: of a stage made without weights.

    Raises:
        InputError: weights that are missing, damaged, of another architecture, twice in several files, or not those
            that the manifest was written with.
    """
    wanted_dtype = find_dtype(dtype)
    files = {_weights_path(folder, name, entry): sha256 for name, sha256 in weight_files(entry)}
    headers = {path: read_header(path) for path in files}
    stored = _joined(headers, what)
    check_tensors(module, stored, what)
    _check_one_type(stored, what)
    if _shapes_only.get():
        put_tensors(module, {key: _shape_of(key, value, wanted_dtype) for key, value in stored.items()})
        return
    tensors, trained = {}, dict(module.named_parameters())
    for path, sha256 in files.items():
        digest = hashlib.sha256()
        for key, value in read_tensors(path, headers[path], digest):
            cast = _is_cast(key, value.dtype)
            tensors[key] = value.to(device, wanted_dtype if cast else None)
            if key in trained:
                check_finite(key, value, what)
        if digest.hexdigest() != sha256:
            raise InputError(
                f"weights {str(path)!r} are not those that {MANIFEST} was written with: their SHA-256 differs"
            )
    put_tensors(module, tensors)


def stored_shapes(folder: Path, entry: Mapping[str, Any], what: str) -> list[tuple[int, ...]]:
    """Return the shapes of a stage's weights in a cascade's folder.

    Raises:
        InputError: as `load_stage_weights`, of files that cannot be read.
    """
    paths = [_weights_path(folder, name, entry) for name, _ in weight_files(entry)]
    return [stored.shape for stored in _joined({path: read_header(path) for path in paths}, what).values()]


@contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, cascades' stages get tensors of the files' types and shapes without memory (on the meta device)."""
    token = _shapes_only.set(True)
    try:
        yield
    finally:
        _shapes_only.reset(token)


def _shape_of(key: str, stored: StoredTensor, dtype: torch.dtype | None) -> Tensor:
    cast = dtype is not None and _is_cast(key, stored.dtype)
    return torch.empty(stored.shape, dtype=dtype if cast else stored.dtype, device="meta")


def _is_cast(key: str, dtype: torch.dtype) -> bool:
    """Return whether a tensor takes the type that a stage is loaded in."""
    return dtype.is_floating_point and not key.startswith(WORDS)


def weight_files(entry: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    """(file name, SHA-256) of each file of a stage's weights, of which its part of the manifest has one or several."""
    weights = entry["weights"]
    return [(one["file"], one.get("sha256")) for one in weights.get("files", [weights])]


def _weights_path(folder: Path, name: str, entry: Mapping[str, Any]) -> Path:
    path = folder / name
    if Path(name).name != name or path.suffix != ".safetensors":
        raise InputError(f"weights {name!r} of stage {entry['name']!r} must be a .safetensors file in {folder}")
    if not os.path.isfile(path):  # False also for names that the file system refuses
        raise InputError(f"weights {str(path)!r} of stage {entry['name']!r} are missing; copy the whole cascade folder")
    return path


def _joined(headers: Mapping[Path, Mapping[str, StoredTensor]], what: str) -> dict[str, StoredTensor]:
    """All tensors of several files by name."""
    owner: dict[str, Path] = {}
    for path, header in headers.items():
        for key in header:
            if key in owner:
                raise InputError(
                    f"weights of {what}: {key!r} is in both {owner[key].name!r} and {path.name!r}; copy the cascade "
                    "again"
                )
            owner[key] = path
    return {key: headers[path][key] for key, path in owner.items()}


def check_tensors(module: nn.Module, tensors: Mapping[str, Tensor | StoredTensor], what: str) -> None:
    """Raises InputError where the tensors are not, by name and shape, those of the module."""
    wanted = module.state_dict()
    missing, foreign = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    for problem, keys in (("lack", missing), ("have, beyond the stage's,", foreign)):
        if keys:
            others = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise InputError(f"weights of {what} {problem} {keys[0]!r}{others}: they belong to another architecture")
    for key, value in wanted.items():
        if (kind := _kind(tensors[key].dtype)) != _kind(value.dtype):
            raise InputError(
                f"weights of {what}: {key!r} holds {kind} numbers ({tensors[key].dtype}), and the stage has "
                f"{_kind(value.dtype)} ones there; save them as {value.dtype}"
            )
        if tuple(value.shape) != tuple(tensors[key].shape):
            raise InputError(
                f"weights of {what}: {key!r} has shape {tuple(tensors[key].shape)}, the stage needs "
                f"{tuple(value.shape)}; they belong to another architecture"
            )


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "floating-point" if dtype.is_floating_point else "boolean" if dtype == torch.bool else "whole"


def _check_one_type(stored: Mapping[str, StoredTensor], what: str) -> None:
    """Raise InputError where floating-point weights are of several types, which no stage computes with."""
    found = {value.dtype: key for key, value in stored.items() if _is_cast(key, value.dtype)}
    if len(found) > 1:
        said = ", ".join(f"{key!r} is {dtype}" for dtype, key in found.items())
        raise InputError(f"weights of {what} are of several types ({said}); save them as one")


def check_finite(key: str, value: Tensor, what: str) -> None:
    """Raise InputError where weights hold NaN or infinite values; vectors of new words that are not trained yet may."""
    if value.is_floating_point() and not key.startswith(WORDS) and not bool(value.isfinite().all()):
        raise InputError(
            f"weights of {what}: {key!r} holds NaN or infinite values, of which no image can come; take an earlier "
            "checkpoint"
        )


def put_tensors(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Puts checked tensors into a module: in the place of its weights, or into these where it has any.

    The tensors of a module without weights (on the meta device) are used themselves, not copied; weights that the
    module shares between two of its parts stay shared, and the layout in memory (channels-last) is the module's.
    """
    shared: dict[int, Tensor] = {}
    empty = False
    for key, wanted in module.state_dict(keep_vars=True).items():
        if not wanted.is_meta:
            continue
        empty = True
        if id(wanted) not in shared:
            value = tensors[key]
            if wanted.stride() != value.stride():
                value = torch.empty_like(wanted, dtype=value.dtype, device=value.device).copy_(value)
            parameter = isinstance(wanted, nn.Parameter)
            shared[id(wanted)] = nn.Parameter(value, wanted.requires_grad) if parameter else value
        tensors[key] = shared[id(wanted)]
    module.load_state_dict(tensors, assign=empty)


# ---- writing


def write_stage_weights(module: nn.Module, folder: Path, name: str, max_shard_size: int) -> list[dict[str, str]]:
    """Writes a stage's tensors, one at a time, to NAME.safetensors or, beyond the size, to several files.

    These are NAME-00001-of-00002.safetensors and so on.

    Args:
        module: the stage.
        folder: of the cascade.
        name: of the stage.
        max_shard_size: bytes of tensors a file; one tensor that is larger has a file of its own.

    Returns:
        The files' names and SHA-256, as the manifest holds them.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, value in module.state_dict().items():
        num_bytes = value.numel() * value.dtype.itemsize
        if shards[-1] and size + num_bytes > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][key] = value
        size += num_bytes
    files = []
    for number, shard in enumerate(shards, 1):
        part = "" if len(shards) == 1 else f"-{number:05}-of-{len(shards):05}"
        file = f"{name}{part}.safetensors"
        files.append({"file": file, "sha256": write_tensors(folder / file, shard)})
    return files
