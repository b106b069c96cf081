"""Locks between processes: who holds one is recorded, and a killed holder's lock is free at once."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from imagen_lightning.errors import InputError
from imagen_lightning.io.atomic import write_text

LOCK = ".lock"  # of a folder


def is_lock(path: Path) -> bool:
    """Return whether this file is a folder's lock, or says who holds it: nothing that fills the folder."""
    return path.name.startswith((LOCK, f".{LOCK}"))


@contextlib.contextmanager
def locked(path: Path, what: str, *, wait: bool = False, advice: str = "wait for its end") -> Iterator[None]:
    """Hold a lock file; makes its folder.

    The operating system frees the lock when the process ends, however it ends; a forked child does not keep it. Host,
    process and command of the holder are recorded next to it, for the message to others.

    Args:
        path: the lock file, `FOLDER/.lock`; it stays, empty.
        what: what is locked, for the message: "run folder runs/base".
        wait: wait for another holder instead of refusing.
        advice: what a refused user should do.

    Raises:
        InputError: another process holds it; the message names that process.
        OSError: the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise InputError(f"{what} is in use by {describe_holder(path)}; {advice}") from None
    holder = holder_path(path)
    try:
        write_text(holder, json.dumps(_this_process()) + "\n")
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink(missing_ok=True)
        lock.release()


def holder_path(path: Path) -> Path:
    """Return the file that records who holds the lock file `path`."""
    return path.with_name(f"{path.name}.holder")


def describe_holder(path: Path) -> str:
    """Say who holds a lock file, as far as it is recorded: "process 123 on HOST (COMMAND, since TIME)"."""
    try:
        holder: dict[str, Any] = json.loads(holder_path(path).read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} ({holder['command']}, since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # the holder has only just taken it, or cannot write here
        return "another process"


def _this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200],
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
