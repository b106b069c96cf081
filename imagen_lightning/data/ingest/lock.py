"""A lock on a folder that processes share."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import reduction
from pathlib import Path
from typing import Any

from imagen_lightning.errors import InputError

_LOCK_WAIT = 10.0  # seconds

log = logging.getLogger(__name__)


class FolderLock:
    """A lock on a folder, held until this process and all those that it was handed to have ended or closed it.

    Raises:
        InputError: another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        until = time.monotonic() + _LOCK_WAIT
        while not self._take(folder):
            if time.monotonic() > until:
                self.close()
                raise InputError(f"another `shards write` is at work in {str(folder)!r}; wait for its end")
            time.sleep(0.05)

    def _take(self, folder: Path) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            log.warning("%s cannot be locked (%s): let no other `shards write` run there", folder, error.strerror)
        return True

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __getstate__(self) -> dict[str, Any]:
        return {"descriptor": reduction.DupFd(self._descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._descriptor = state["descriptor"].detach()


@contextmanager
def locked(folder: Path) -> Iterator[FolderLock]:
    """The folder, made if need be and removed again where nothing came to lie in it, under a lock."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{str(folder)!r} is a file; give a folder")
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder)
    try:
        yield lock
    finally:
        if made and not any(folder.iterdir()):
            folder.rmdir()
        lock.close()
