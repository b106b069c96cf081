"""Shards made from their records, one after another or in processes side by side."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from imagen_lightning.data.filters import Filter
from imagen_lightning.data.ingest.lock import FolderLock
from imagen_lightning.data.ingest.plan import Note, Task, write_note
from imagen_lightning.data.ingest.record import Fault, Source
from imagen_lightning.data.ingest.samples import Filtered, ImageSettings, make_sample
from imagen_lightning.data.shards import ShardWriter
from imagen_lightning.errors import InputError

_REPORT_EVERY = 0.2  # seconds
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Progress(NamedTuple):
    """Records dealt with since the last report."""

    done: int
    skipped: int
    filtered: int


@dataclass(frozen=True)
class Job:
    """What all shards of a run share; it can be pickled.

    Attributes:
        source: their records.
        path: of the source.
        out: the folder to write.
        images: how images are stored.
        filter: removes samples by their metadata.
    """

    source: Source
    path: Path
    out: Path
    images: ImageSettings
    filter: Filter | None


class _OneShard(ShardWriter):
    """Writes the one shard of this number."""

    def __init__(self, folder: Path, task: Task) -> None:
        super().__init__(folder, task.split, sys.maxsize)
        self._task = task

    def _name(self) -> str:
        return f"{self._task.name}.tar"


def make_shard(job: Job, task: Task, watch: Callable[[Progress], object]) -> None:
    """Makes one shard and its note; a shard without samples is a note alone.

    Raises:
        InputError: the source is damaged, or gone.
        OSError: it cannot be read, or the shard cannot be written; nothing of it is left.
    """
    note = Note()
    reporter = _Reporter(watch)
    with _OneShard(job.out, task) as writer:
        for number, place in task.records:
            record = job.source.read(place)
            try:
                members = make_sample(record, job.images, job.filter)
            except Fault as fault:
                note.skipped.append((record.key, fault.reason))
            except Filtered as filtered:
                note.filtered.append((record.key, filtered.reason))
            else:
                writer.write(f"{number:09d}", members)
                note.samples += 1
            reporter.at(Progress(note.samples, len(note.skipped), len(note.filtered)))
        if not job.path.exists():  # its records' images then are missing for no fault of theirs
            raise InputError(f"source {str(job.path)!r} went away")
        write_note(job.out, task.name, note)
    reporter.end()


class _Reporter:
    """Passes the growth of a shard's counts on, now and then."""

    def __init__(self, watch: Callable[[Progress], object]) -> None:
        self._watch = watch
        self._last = time.monotonic()
        self._said = self._now = Progress(0, 0, 0)

    def at(self, counts: Progress) -> None:
        self._now = Progress(sum(counts), counts.skipped, counts.filtered)
        if time.monotonic() - self._last > _REPORT_EVERY:
            self.end()

    def end(self) -> None:
        self._watch(Progress(*(now - said for now, said in zip(self._now, self._said))))
        self._said, self._last = self._now, time.monotonic()


def make_shards(
    job: Job, tasks: Sequence[Task], num_workers: int, lock: FolderLock, watch: Callable[[Progress], object]
) -> None:
    """Makes shards in this process (0 workers) or in others; their bytes are the same.

    Raises:
        InputError: as `make_shard`, or a worker was killed; the shards that are there are whole.
        OSError: as `make_shard`.
    """
    if num_workers == 0:
        for task in tasks:
            make_shard(job, task, watch)
        job.source.close()
        return
    with Workers(job, min(num_workers, len(tasks)), lock) as workers:
        workers.make(tasks, watch)


# ---- processes


class _Made(NamedTuple):
    """A worker has made its shard."""


class _Failed(NamedTuple):
    """A worker cannot make its shard."""

    error: Exception


class Workers:
    """Processes that make a shard at a time; leaving the context ends them at once.

    They are started anew ("spawn"), take no signals of the terminal, hold the folder's lock with this process, and end
    when it does, however it ends.
    """

    def __init__(self, job: Job, num: int, lock: FolderLock) -> None:
        self._job = job
        self._num = num
        self._lock = lock
        self._processes: dict[Connection, Any] = {}

    def __enter__(self) -> Workers:
        context = multiprocessing.get_context("spawn")
        resource_tracker.ensure_running()  # which would unblock the signals
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # which the processes inherit
        try:
            for _ in range(self._num):
                here, there = context.Pipe()
                process = context.Process(target=_work, args=(self._job, self._lock, there), daemon=True)
                process.start()
                there.close()
                self._processes[here] = process
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for process in self._processes.values():
            process.kill()
        for connection, process in self._processes.items():
            process.join()
            connection.close()

    def make(self, tasks: Sequence[Task], watch: Callable[[Progress], object]) -> None:
        """Hands the shards out until all are made."""
        left = deque(tasks)
        busy: dict[Any, Task] = {}
        for connection in self._processes:
            self._hand(connection, left, busy)
        while busy:
            ready: list[Any] = wait(list(busy))
            for connection in ready:
                try:
                    message = connection.recv()
                except (EOFError, ConnectionResetError):
                    raise self._death(connection, busy[connection]) from None
                if isinstance(message, _Failed):
                    raise message.error
                if isinstance(message, _Made):
                    self._hand(connection, left, busy)
                else:
                    watch(message)

    def _hand(self, connection: Any, left: deque[Task], busy: dict[Any, Task]) -> None:
        busy.pop(connection, None)
        if left:
            busy[connection] = left.popleft()
            try:
                connection.send(busy[connection])
            except (BrokenPipeError, ConnectionResetError):
                raise self._death(connection, busy[connection]) from None

    def _death(self, connection: Any, task: Task) -> Exception:
        process = self._processes[connection]
        process.join()
        if process.exitcode > 0:
            return RuntimeError(f"a worker failed at {task.name}; what it said stands above")
        name = signal.Signals(-process.exitcode).name if process.exitcode else "an exit"
        return InputError(f"a worker was ended by {name} at {task.name}; if memory is short give fewer --workers")


def _work(job: Job, lock: FolderLock, connection: Connection) -> None:
    """A worker's life: shards as they are handed to it, and the lock held."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the other end is gone
        while True:
            task = connection.recv()
            connection.send(_attempt(job, task, connection.send))


def _attempt(job: Job, task: Task, watch: Callable[[Progress], object]) -> _Made | _Failed:
    try:
        make_shard(job, task, watch)
    except (InputError, OSError) as error:
        return _Failed(error)
    return _Made()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
