"""A cache of whole remote shards: a folder of bounded size that several processes share, and reading ahead into it.

    CACHE/indexes/NAME-DIGEST.index     the index of each shard that was ever opened; these stay
    CACHE/shards/DIGEST-NAME            whole shards, their time of change that of their last use
    CACHE/shards/….SIZE.partial         one that is being fetched, with the room that it will take
    CACHE/shards/….lock                 held by the process that fetches it

A reader holds a shared lock on the shard that it has open, and only a shard on which no lock is held is thrown out.
Locks go with their process, however it ends.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from imagen_lightning.data.index import (
    ShardIndex,
    cached_index,
    index_bytes,
    index_shard,
    parse_index,
    read_indexes,
)
from imagen_lightning.data.remote import WrongTransfer, attempt, filesystem
from imagen_lightning.data.skips import Unusable
from imagen_lightning.data.walk import hash_samples
from imagen_lightning.errors import InputError
from imagen_lightning.io.atomic import write_bytes

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE = 300  # seconds to wait for room

_CHANGED = "; if it has changed since it was indexed, run `imagen-lightning shards index --force`"


def cache_size(gigabytes: float) -> int:
    """Return a cache's size in bytes.

    Raises:
        InputError: it is not a number of at least 0.
    """
    if not (math.isfinite(gigabytes) and gigabytes >= 0):
        raise InputError(f"cache_gb {gigabytes} must be a number of at least 0")
    return round(gigabytes * 1e9)


class CacheFull(InputError):
    """There is no room: every shard in the cache is in use."""


class ShardCache:
    """Whole remote shards in a folder of bounded size; the least recently used go first, those in use never.

    Args:
        folder: made if need be; shared by any number of processes and runs.
        max_bytes: of the shards in it.
        attempts: how often a transfer is tried.
        pause: seconds before the second attempt; each further pause is twice as long.
    """

    def __init__(self, folder: Path, max_bytes: int, attempts: int = 5, pause: float = 0.5) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.attempts = attempts
        self.pause = pause

    def path(self, address: str) -> Path:
        """Where a shard lies once it is fetched."""
        digest = hashlib.sha256(address.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        return self.folder / "shards" / f"{digest}-{Path(address.split('?')[0]).name}"

    def prepare(self) -> None:
        """Makes the folder.

        Raises:
            InputError: it cannot be made or written.
        """
        try:
            (self.folder / "shards").mkdir(parents=True, exist_ok=True)
            (self.folder / "indexes").mkdir(exist_ok=True)
            with _locked(self.folder / "shards" / "room.lock"):
                pass
        except OSError as error:
            raise InputError(
                f"cache {str(self.folder)!r} cannot be written ({error.strerror}); name another folder (cache), or set "
                "IMAGEN_LIGHTNING_CACHE"
            ) from None

    def check(self, sizes: Sequence[int], together: int) -> None:
        """Sees to it that so many shards, the largest ones, fit in at once.

        Raises:
            InputError: they do not.
        """
        needed = sum(sorted(sizes)[-together:])
        if needed > self.max_bytes:
            raise InputError(
                f"a cache of {self.max_bytes / 1e9:g} GB does not hold the {min(together, len(sizes))} shards that are "
                f"read and fetched at once ({needed / 1e9:.3g} GB); raise cache_gb, or shuffle fewer together (window)"
            )

    def open(self, index: ShardIndex, patience: float = 0) -> int:
        """A descriptor of a shard, fetched if need be; as long as it is open the shard stays.

        Args:
            index: of the shard.
            patience: seconds to wait for room.

        Raises:
            InputError: it cannot be fetched, is not what was indexed, or is larger than the cache; as CacheFull, there
                is no room.
        """
        while (descriptor := self._hold(index.shard, index.size)) is None:
            self._await_room(index.shard, index, patience)
        return descriptor

    def close(self, descriptor: int) -> None:
        """Lets go of what `open` gave."""
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process forked meanwhile has it open too
        os.close(descriptor)

    def _hold(self, address: str, size: int | None) -> int | None:
        """A descriptor with a shared lock of a cached shard; None where there is none of that size."""
        path = self.path(address)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        status = os.fstat(descriptor)
        if status.st_nlink and size in (None, status.st_size):
            _touch(descriptor)
            return descriptor
        self.close(descriptor)
        if status.st_nlink:  # cut by a crash of the machine, or of another state of the shard
            path.unlink(missing_ok=True)
        return None

    def open_index(self, address: str, force: bool = False) -> ShardIndex:
        """The index of a remote shard, with SHA-256: the one kept in the cache, else that beside the shard, else one
        made of the shard itself, which is fetched for it.

        Raises:
            InputError: the shard cannot be fetched; as CacheFull, there is no room for it.
        """
        file = cached_index(address, self.folder)
        if force:
            file.unlink(missing_ok=True)
            self.path(address).unlink(missing_ok=True)
        kept = read_indexes(address, [file])
        if not kept:
            index = self._sidecar(address) or self._own_index(address)
            write_bytes(file, index_bytes(replace(index, mtime=None)))
            kept = read_indexes(address, [file])
        return replace(kept[0], held=None)

    def _sidecar(self, address: str) -> ShardIndex | None:
        name, mark, query = address.partition("?")
        beside = f"{name}.index{mark}{query}"
        system, path = filesystem(beside)
        try:
            index = parse_index(self._attempt(lambda: system.cat_file(path), f"index {beside!r}"), address)
        except FileNotFoundError:
            return None
        except ValueError as error:
            log.warning("index %s cannot be used: %s", beside, error)
            return None
        return index if index.hashed else None

    def path_beside(self, address: str) -> Path:
        """A path in the cache for files that belong to a shard, where the parquet beside it, if any, has been fetched.

        Raises:
            InputError: the network fails.
        """
        kept = cached_index(address, self.folder)
        path = kept.with_name(f"{kept.stem.replace('.', '-')}.tar")
        parquet = path.with_suffix(".parquet")
        name, mark, query = address.partition("?")
        beside = f"{name.removesuffix('.tar')}.parquet{mark}{query}"
        if not parquet.exists():
            system, place = filesystem(beside)
            with suppress(FileNotFoundError):
                write_bytes(parquet, self._attempt(lambda: system.cat_file(place), f"table {beside!r}"))
        return path

    def _own_index(self, address: str) -> ShardIndex:
        while (descriptor := self._hold(address, None)) is None:
            self._await_room(address, None, PATIENCE)
        try:
            return index_shard(self.path(address), hashes=True)
        finally:
            self.close(descriptor)

    def _await_room(self, address: str, index: ShardIndex | None, patience: float) -> None:
        """Fetches a shard when others, here or in other processes, have let go of theirs."""
        end = time.monotonic() + patience
        while True:
            try:
                self.fetch(address, index)
            except CacheFull:  # noqa: PERF203
                if time.monotonic() > end:
                    raise
                time.sleep(self.pause)
            else:
                return

    def fetch(
        self, address: str, index: ShardIndex | None = None, keep: Collection[str] = (), wait: bool = True
    ) -> bool:
        """Brings a shard into the cache, if it is not there.

        Args:
            address: the shard.
            index: its index, by whose size and SHA-256 the transfer is checked.
            keep: addresses of shards that must not make room for it.
            wait: where another process fetches it, wait for that.

        Returns:
            Whether it is there; False only without `wait`.

        Raises:
            InputError: it cannot be fetched, is not what was indexed, or is larger than the cache; as CacheFull, there
                is no room.
        """
        path = self.path(address)
        with _locked(path.with_name(f"{path.name}.lock"), wait) as mine:
            if mine and path.exists():
                _touch(path)
            elif mine:
                try:
                    self._transfer(address, path, index, keep)
                except FileNotFoundError:
                    raise InputError(f"shard {address!r} does not exist; check the address") from None
        return mine

    def _transfer(self, address: str, path: Path, index: ShardIndex | None, keep: Collection[str]) -> None:
        system, place = filesystem(address)
        what = f"shard {address!r}"
        size = index.size if index else self._attempt(lambda: system.info(place).get("size"), what)
        for left in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):  # by a process that was killed
            left.unlink(missing_ok=True)
        partial = path.with_name(f"{path.name}.{size or 0}.partial")
        self._make_room(size or 0, keep, partial)
        try:
            self._attempt(lambda: _receive(system, place, partial, size, index), what)
            if size is None:
                self._make_room(partial.stat().st_size, keep, partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, size: int, keep: Collection[str], partial: Path) -> None:
        """Throws out shards until `size` bytes are free, and takes these for `partial`."""
        if size > self.max_bytes:
            raise InputError(f"a shard of {size} bytes does not fit into a cache of {self.max_bytes}; raise cache_gb")
        kept = {self.path(address) for address in keep}
        with _locked(partial.with_name("room.lock")):
            used = 0
            shards: list[tuple[float, int, Path]] = []
            for entry in os.scandir(partial.parent):
                file = Path(entry.path)
                with suppress(FileNotFoundError):
                    if file.suffix == ".partial":
                        used += 0 if file == partial else self._reserved(file)
                    elif file.suffix != ".lock":
                        status = entry.stat()
                        used += status.st_size
                        shards.append((status.st_mtime, status.st_size, file))
            for _, bytes_, file in sorted(shards):
                if used + size > self.max_bytes and file not in kept and _discard(file):
                    used -= bytes_
            if used + size > self.max_bytes:
                raise CacheFull(
                    f"cache {str(self.folder)!r} of {self.max_bytes / 1e9:g} GB is full of shards in use; make it "
                    "larger (cache_gb), or give this run another (cache)"
                )
            partial.touch()

    @staticmethod
    def _reserved(partial: Path) -> int:
        """The room that an unfinished transfer will take; one whose process has ended is removed."""
        name, size, _ = partial.name.rsplit(".", 2)
        with _locked(partial.with_name(f"{name}.lock"), wait=False) as ended:
            if ended:
                partial.unlink(missing_ok=True)
        return 0 if ended else int(size)

    def _attempt(self, action: Callable[[], T], what: str) -> T:
        return attempt(action, what, self.attempts, self.pause)


def _receive(system: Any, place: str, partial: Path, size: int | None, index: ShardIndex | None) -> None:
    """One transfer, checked and on the disk."""
    system.get_file(place, str(partial))
    with partial.open("rb") as file:
        os.fsync(file.fileno())
        received = os.fstat(file.fileno()).st_size
        if size is not None and received != size:
            raise WrongTransfer(f"{received} bytes came of {size}{_CHANGED if index else ''}")
        if index is not None and hash_samples(file.fileno(), index.spans).tobytes() != index.digests().tobytes():
            raise WrongTransfer(f"its samples are not those of its index{_CHANGED}")


def _touch(file: Path | int) -> None:
    """Notes that a shard is used."""
    with suppress(PermissionError):  # another user's
        os.utime(file)


def _discard(file: Path) -> bool:
    """Removes a shard that nobody holds; whether it is gone."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


@contextmanager
def _locked(file: Path, wait: bool = True) -> Iterator[bool]:
    """Holds a lock file; gives whether it does, which without `wait` it may not. The file goes with the lock."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            yield False
            return
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                break
        os.close(descriptor)  # the one who held it has removed the file
    try:
        yield True
    finally:
        file.unlink(missing_ok=True)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


class ReadAhead:
    """Fetches the shards that will be needed next in a thread of its own; one for each process."""

    def __init__(self, cache: ShardCache) -> None:
        self.cache = cache
        self.process = os.getpid()
        self._wanted: list[ShardIndex] = []
        self._keep: list[str] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def want(self, indexes: Sequence[ShardIndex]) -> None:
        """Sets what to fetch, in order; what was wanted before and is not begun is forgotten."""
        with self._lock:
            self._wanted = list(indexes)
            self._keep = [index.shard for index in indexes]
            if self._wanted and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._thread = None
                    return
                index = self._wanted.pop(0)
                keep = self._keep
            try:
                self.cache.fetch(index.shard, index, keep, wait=False)
            except (InputError, Unusable, RuntimeError) as error:  # RuntimeError: the interpreter is ending
                log.info("read-ahead of %s: %s", index.shard, error)  # whoever needs the shard will meet it and say so
