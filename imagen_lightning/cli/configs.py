"""The YAML files that verbs are given; imports no torch, so that refusals are quick."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from imagen_lightning.errors import InputError
from imagen_lightning.files import read_text
from imagen_lightning.io.yaml import MAX_BYTES, read_yaml


def find_config(name: str) -> Path:
    """The YAML of that path, or the one of that name that ships with the package ("experiments/quickstart/base.yaml").

    Raises:
        InputError: there is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        raise InputError(f"configuration {name!r} is a folder; give a YAML file")
    shipped = Path(__file__).parent.parent / "experiments"
    inside = shipped.joinpath(*path.parts[1:]) if path.parts[:1] == ("experiments",) else shipped / path
    if not path.is_absolute() and inside.is_file():
        return inside
    raise InputError(
        f"configuration {name!r} does not exist; give a YAML file or one that ships, e.g. quickstart/base.yaml"
    )


def read_config(path: Path) -> dict[str, Any]:
    """A YAML's keys; raises InputError where it has none or cannot be read."""
    content = read_yaml(read_text(path, "configuration", MAX_BYTES), f"configuration {str(path)!r}")
    if not isinstance(content, dict):
        raise InputError(f"configuration {str(path)!r} holds no keys such as `model:`; experiments/ has examples")
    return content
