"""Local files and folders: what is refused, what is written whole, and an error's first line."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from imagen_lightning.io.atomic import temporary_path
from imagen_lightning.types import InputError


@contextlib.contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Gives a new folder to write into, which becomes `folder` when the block ends well and vanishes when it does not.

    Raises:
        InputError: `folder` is there and not empty, or cannot be written.
    """
    refuse_address(folder, "output folder")
    target = Path(folder).expanduser().resolve()
    partial = temporary_path(target)
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InputError(f"output folder {str(folder)!r} is there already and not empty; give another")
        partial.mkdir(parents=True)
        yield partial
        partial.replace(target)
    except OSError as error:
        raise InputError(f"output folder {str(folder)!r} cannot be written: {first_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def refuse_address(path: str | Path, what: str) -> None:
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path), re.IGNORECASE):
        raise InputError(f"{what} {str(path)!r} is an address; only local files are read: fetch it first")


def first_line(error: Exception) -> str:
    """The first sentence of an error, on one line."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
