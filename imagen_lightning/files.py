"""Files written whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imagen_lightning.errors import InputError
from imagen_lightning.io.atomic import write_text

_MENDS = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room within the disk's quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EACCES: "let this user write there",
    errno.EPERM: "let this user write there",
    errno.EROFS: "make that disk writable",
}


def unwritable(error: OSError, folder: Path) -> InputError | None:
    """The line on a file in the folder that cannot be written, and the mend; None for any other error."""
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
    if error.errno not in _MENDS or path is None or folder.resolve() not in path.resolve().parents:
        return None
    return InputError(f"{path} cannot be written: {error.strerror}; {_MENDS[error.errno]}")


def parse_json(text: str | bytes, depth: int = 100) -> Any:
    """Return what JSON text says.

    Raises:
        ValueError: it is not JSON, or lists and objects lie in each other more than `depth` deep, which ends programs
            that walk through them.
    """
    try:
        value = json.loads(text)
        level = [value]
        for _ in range(depth):
            lists = [list(item.values()) if isinstance(item, dict) else item for item in level]
            level = [item for items in lists if isinstance(items, list) for item in items]
            if not level:
                return value
    except RecursionError:
        pass
    raise ValueError(f"its lists and objects lie more than {depth} deep in each other")


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON whole or not at all; numbers that JSON lacks become "nan", "inf" and "-inf"."""
    write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def begin_folder(out: Path, name: str, plan: Mapping[str, Any], what: str) -> None:
    """Makes OUT and notes in OUT/NAME what it is to hold, or checks that it was begun for the very same.

    Args:
        out: the folder.
        name: of the note, JSON.
        plan: what is asked for, plain data; what else an earlier note says does not count.
        what: the folder holds, for messages: "evaluation".

    Raises:
        InputError: it holds something else; the message names what differs.
    """
    path, wanted = out / name, json.loads(json.dumps(plain(plan)))  # as it is read back
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"--out {str(out)!r} is not empty and holds no {what}; give another folder")
        write_json(path, wanted)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{path} cannot be read; give another --out, or delete {out}") from None
    for key, value in wanted.items():
        if found.get(key) != value:
            raise InputError(
                f"--out {str(out)!r} holds another {what}: its {key} is {found.get(key)!r}, this one's {value!r}; give "
                "another folder"
            )


def plain(value: Any) -> Any:
    """Mappings, lists and tuples as JSON has them, with "nan", "inf" and "-inf" for the numbers that it lacks."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
