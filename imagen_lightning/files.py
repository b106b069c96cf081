"""Files written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file whole or not at all; makes its folder.

    Raises:
        OSError: it cannot be written, with its path; nothing is left of it.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8", newline="")
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # of a folder that cannot even be looked into
            partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON whole or not at all; numbers that JSON lacks become "nan", "inf" and "-inf"."""
    write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """Mappings, lists and tuples as JSON has them, with "nan", "inf" and "-inf" for the numbers that it lacks."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
