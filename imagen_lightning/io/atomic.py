"""Write files whole or not at all, safe for several writers at once."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.partial")


def temporary_path(path: Path) -> Path:
    """Return a path next to `path` that no other writer uses."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def is_temporary(path: Path) -> bool:
    """Return whether a killed writer left this file."""
    return _TEMPORARY.fullmatch(path.name) is not None


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, which becomes `path` when the block ends well and vanishes otherwise.

    Makes the folder. The temporary name is unique, so several processes may write the same file: the last one wins.

    Raises:
        OSError: the file cannot be written; it names `path`, not the temporary file.
    """
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        folders = {str(temporary), *map(str, temporary.parents)}
        if error.filename is not None and str(error.filename) not in folders:  # of another file
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # a folder that cannot even be looked into
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all; line ends stay as given.

    Raises:
        OSError: it cannot be written.
    """
    write_bytes(path, text.encode("utf-8"))
