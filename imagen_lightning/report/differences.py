"""What differs between configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from imagen_lightning.errors import InputError

_MOST = 20_000  # entries of one configuration
_PLACES = ("run", "trainer.default_root_dir", "ckpt_path", "resume")  # where a run lies, not what it is
_MISSING = "—"


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Nested keys joined by dots; a class and its arguments count as one level (`model.image_size`), lists of plain
    values as one value.

    Raises:
        InputError: more entries than any real configuration has, as YAML's aliases can make.
    """
    flat: dict[str, Any] = {}
    pending: list[tuple[str, Any]] = [("", config)]
    visited = 0
    while pending:
        path, value = pending.pop()
        visited += 1
        if visited > _MOST:
            raise InputError(f"a configuration has more than {_MOST} entries")
        if isinstance(value, Mapping) and value:
            joined = "class_path" in value
            children = {
                path if joined and key == "init_args" else f"{path}.{key}".lstrip("."): item
                for key, item in value.items()
                if not (joined and key == "init_args" and not item)
            }
            pending += reversed(children.items())
        elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
            pending += reversed([(f"{path}.{number}", item) for number, item in enumerate(value)])
        else:
            flat[path] = value
    return {key.removesuffix(".class_path"): value for key, value in flat.items()}


def differing(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The flattened keys whose values are not all equal, with each configuration's value in words."""
    flats = [flatten(config) for config in configs]
    keys = list(dict.fromkeys(key for flat in flats for key in flat))
    found = {}
    for key in keys:
        if key in _PLACES:
            continue
        values = [words(flat[key]) if key in flat else _MISSING for flat in flats]
        if len(set(values)) > 1:
            found[key] = values
    return found


def words(value: Any) -> str:
    """A configuration's value for people: this package's own classes without their module."""
    if isinstance(value, str):
        return value.rpartition(".")[2] if value.startswith("imagen_lightning.") else value
    if isinstance(value, list):
        return ", ".join(words(item) for item in value[:20]) + (", …" if len(value) > 20 else "")
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
