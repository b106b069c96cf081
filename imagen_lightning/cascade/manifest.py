"""`cascade.json`: what it says of the whole cascade, and how it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from imagen_lightning import __version__
from imagen_lightning.cascade.local import first_line, refuse_address
from imagen_lightning.components import short
from imagen_lightning.files import parse_json
from imagen_lightning.types import InputError

MANIFEST = "cascade.json"
FORMAT = "imagen-lightning cascade"
VERSION = 1
VALUE_RANGE = [-1.0, 1.0]
RESIZE = {"down": "area", "up": "bilinear"}


def read_manifest(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """The manifest's path and content, its version and conventions checked."""
    refuse_address(folder, "cascade")
    path = Path(folder).expanduser() / MANIFEST
    if not path.is_file():
        raise InputError(
            f"{str(folder)!r} is no cascade folder: it has no {MANIFEST}; `imagen-lightning cascade` makes one"
        )
    try:
        manifest = parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # of JSON and of UTF-8
        raise InputError(f"{path} is damaged ({first_line(error)}); make the cascade anew") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not the manifest of a cascade; its format should be {FORMAT!r}")
    for key, known in (("version", VERSION), ("value_range", VALUE_RANGE), ("resize", RESIZE)):
        if manifest.get(key) != known:
            raise InputError(
                f"{path}: {key} {short(manifest.get(key))} is unknown to imagen-lightning {__version__}, which reads "
                f"{known!r}; another version may read it"
            )
    entries = manifest.get("stages")
    whole = isinstance(entries, list) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("stage"), dict)
        and isinstance(entry["stage"].get("class_path"), str)
        and isinstance(entry.get("weights"), dict)
        and _are_files(entry["weights"].get("files", [entry["weights"]]))
        for entry in entries
    )
    if not whole or not entries:
        raise InputError(f"{path} is damaged: each of its stages needs name, stage and weights; make the cascade anew")
    metrics = manifest.get("metrics")
    if not isinstance(metrics, list) or not all(isinstance(metric, dict) for metric in metrics):
        raise InputError(f"{path} is damaged: its metrics are not a list of objects; make that [] or correct it")
    return path, manifest


def _are_files(files: Any) -> bool:
    """Whether a manifest's files of weights are at least one object with a name."""
    return (
        isinstance(files, list)
        and bool(files)
        and all(isinstance(one, dict) and isinstance(one.get("file"), str) for one in files)
    )
