"""Where a stage's weights come from: plain data that goes with them, licences above all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from imagen_lightning.cascade.local import file_sha256
from imagen_lightning.metrics.protocol import MERGED, NOT_RECORDED, WEIGHTS
from imagen_lightning.stages import DiffusionMixin
from imagen_lightning.types import InputError

LICENCE_KEYS = ("licence", "license")


def descended(entry: Mapping[str, Any], manifest: Path) -> dict[str, Any]:
    """The origin of a stage that starts from one of a cascade, which is named by its weights' SHA-256.

    Args:
        entry: the parent's part of its manifest.
        manifest: its path, of which only the folder's name is kept.
    """
    weights = entry["weights"]
    parent = {
        "cascade": manifest.resolve().parent.name,
        "stage": entry["name"],
        "sha256": [one.get("sha256") for one in weights.get("files", [weights])],
        "weights": weights.get("record"),
        "origin": entry.get("origin"),
    }
    return {"parents": [parent]}


def check_origin(origin: Any, what: str) -> dict[str, Any] | None:
    """The origin that a file holds, if it is plain data.

    Raises:
        InputError: it is something else.
    """
    if origin is None:
        return None
    if not isinstance(origin, dict) or not _is_plain(origin):
        raise InputError(f"{what}: its origin is no plain data (names, lists, texts, numbers); mend or remove it")
    return origin


def check_record(record: Any, what: str) -> dict[str, Any] | None:
    """Return what a file says its weights are, None where it says nothing.

    Raises:
        InputError: it is no plain data, or of an unknown kind.
    """
    if record is None:
        return None
    if not isinstance(record, dict) or not _is_plain(record) or record.get("kind") not in WEIGHTS:
        raise InputError(
            f"{what}: the record of its weights is {record!r}; its kind must be one of {', '.join(WEIGHTS)}; fix or "
            "remove it"
        )
    return record


def merged_record(base: Mapping[str, Any] | None, adapters: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """Return the record of weights to which adapters were added, from those of the base and of the adapters."""
    return {"kind": MERGED, "base": base, "adapters": list(adapters)}


def weights_kind(stage: DiffusionMixin) -> str:
    """Return what a stage's weights are, one of `imagen_lightning.metrics.protocol.WEIGHTS`."""
    return str((stage.weights_record or {}).get("kind", NOT_RECORDED))


def weights_words(stage: DiffusionMixin) -> str:
    """Return the same in full, for people: "ema (decay=0.9999)"."""
    details = {key: value for key, value in (stage.weights_record or {}).items() if key != "kind"}
    inner = ", ".join(f"{key}={json.dumps(value)}" for key, value in details.items())
    return f"{weights_kind(stage)} ({inner})" if inner else weights_kind(stage)


def weights_kinds(stages: Sequence[DiffusionMixin]) -> str | list[str]:
    """Return the same of several stages as a protocol holds it: one value, or one a stage."""
    kinds = [weights_kind(stage) for stage in stages]
    return kinds[0] if len(kinds) == 1 else kinds


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def licences(origin: Mapping[str, Any] | None) -> list[str]:
    """Every licence that an origin or its parents name, each once, printable on one line."""
    return list(dict.fromkeys(_licences(origin)))


def _licences(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key in LICENCE_KEYS and isinstance(item, str):
                yield "".join(character for character in item if character.isprintable())
            else:
                yield from _licences(item)
    elif isinstance(value, list):
        for item in value:
            yield from _licences(item)


def enlarged(origin: Mapping[str, Any] | None, part: Mapping[str, Any]) -> dict[str, Any]:
    """The origin of a stage to whose weights something was added: an adapter, new words."""
    parents = (origin or {}).get("parents")
    if origin is not None and set(origin) == {"parents"} and isinstance(parents, list):
        return {"parents": [*parents, dict(part)]}
    return {"parents": [*([] if origin is None else [{"origin": dict(origin)}]), dict(part)]}


def file_facts(path: str | Path) -> dict[str, Any]:
    """The name and the SHA-256 of each file of `path`, a file or a folder of files."""
    path = Path(path).expanduser().resolve()
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    return {"name": path.name, "files": [{"file": file.name, "sha256": file_sha256(file)} for file in files]}
