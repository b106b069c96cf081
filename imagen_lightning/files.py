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
from imagen_lightning.io.locks import LOCK, is_lock, locked

_MENDS = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room within the disk's quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EACCES: "let this user write there",
    errno.EPERM: "let this user write there",
    errno.EROFS: "make that disk writable",
}


def explain_os_error(error: OSError) -> str:
    """Return the line on an error of the operating system: the path, the reason and, where it is known, the fix."""
    if error.errno is None:  # a library's own, such as a network's; of a loader's process with its traceback
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[-1] if lines[0].startswith("Caught ") else lines[0]
    reason = f"{error.strerror or os.strerror(error.errno)}"
    if error.errno in _MENDS:
        reason = f"{'cannot be written' if error.filename else 'a file cannot be written'}: {reason}"
        reason = f"{reason}; {_MENDS[error.errno]}"
    elif error.filename is not None:
        reason = f"cannot be read or written: {reason}"
    return reason if error.filename is None else f"{_named(error.filename)} {reason}"


def _named(filename: Any) -> str:
    return os.fsdecode(filename) if isinstance(filename, str | bytes) else str(filename)


def unwritable(error: OSError, folder: Path) -> InputError | None:
    """The line on a file in the folder that cannot be written, and the mend; None for any other error."""
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
    if error.errno not in _MENDS or path is None or folder.resolve() not in path.resolve().parents:
        return None
    return InputError(explain_os_error(error))


def read_text(path: Path, what: str, most: int = 2**26) -> str:
    """Return the text of a UTF-8 file, without its byte order mark.

    Args:
        path: the file.
        what: it is, for messages: "configuration".
        most: bytes that it may have.

    Raises:
        InputError: it cannot be read, is too large or not UTF-8.
    """
    try:
        with path.open("rb") as file:  # of a device or pipe, which has no size, no more than that is read
            data = file.read(most + 1)
    except OSError as error:
        raise InputError(f"{what} {str(path)!r} cannot be read: {error.strerror}") from None
    if len(data) > most:
        raise InputError(f"{what} {str(path)!r} has more than {most:,} bytes; is it the right file?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} {str(path)!r} is not UTF-8 (byte {error.start}); save it as UTF-8") from None


def read_json(path: Path, what: str, most: int = 2**26) -> Any:
    """Return what a JSON file holds.

    Raises:
        InputError: see `read_text`; or it is damaged, or nested too deeply.
    """
    try:
        return parse_json(read_text(path, what, most))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{what} {str(path)!r} is damaged: {error}") from None


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
    if not check_folder(out, name, plan, what):
        write_json(out / name, plan)


def check_folder(out: Path, name: str, plan: Mapping[str, Any], what: str) -> bool:
    """Return whether OUT was begun for what `begin_folder` is to note in it; writes nothing.

    Raises:
        InputError: see there.
    """
    path, wanted = out / name, json.loads(json.dumps(plain(plan)))  # as it is read back
    if not path.exists():
        if out.exists() and (not out.is_dir() or not all(map(is_lock, out.iterdir()))):
            raise InputError(f"--out {str(out)!r} is not empty and holds no {what}; give another folder")
        return False
    found = read_json(path, "file")
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged; give another --out, or delete {out}")
    for key, value in wanted.items():
        if found.get(key) != value:
            raise InputError(
                f"--out {str(out)!r} holds another {what}: its {key} is {found.get(key)!r}, this one's {value!r}; give "
                "another folder"
            )
    return True


@contextlib.contextmanager
def begun_folder(out: Path, name: str, plan: Mapping[str, Any], what: str) -> Iterator[None]:
    """Begin OUT as `begin_folder` does and hold it: no other process that does so works in it at the same time.

    Raises:
        InputError: as `begin_folder`; another process holds it.
    """
    begin_folder(out, name, plan, what)  # first: a folder that holds something else gets no lock file
    with locked(out / LOCK, f"--out {str(out)!r}"):
        begin_folder(out, name, plan, what)  # another one may have begun it meanwhile
        yield


def plain(value: Any) -> Any:
    """Mappings, lists and tuples as JSON has them, with "nan", "inf" and "-inf" for the numbers that it lacks."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
