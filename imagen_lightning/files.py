"""Files written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from imagen_lightning.errors import InputError
from imagen_lightning.io.atomic import write_text
from imagen_lightning.io.locks import locked

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


@contextlib.contextmanager
def begun_folder(out: Path, name: str, plan: Mapping[str, Any], what: str) -> Iterator[None]:
    """Begin OUT as `begin_folder` does and hold it: no other process that does so works in it at the same time.

    Raises:
        InputError: as `begin_folder`; another process holds it.
    """
    begin_folder(out, name, plan, what)  # first: a folder that holds something else gets no lock file
    with locked(out / ".lock", f"--out {str(out)!r}"):
        begin_folder(out, name, plan, what)  # another one may have begun it meanwhile
        yield


def plain(value: Any) -> Any:
    """Mappings, lists and tuples as JSON has them, with "nan", "inf" and "-inf" for the numbers that it lacks."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
