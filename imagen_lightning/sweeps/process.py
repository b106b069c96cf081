"""A trial's process: begun in a session of its own, ended with its sweep, and recognised after the sweep's death.

The process inherits a locked file. The lock lasts as long as the process does, whatever becomes of the sweep, so that
a sweep that begins again knows whether a trial of the killed one still trains, and never starts a second one in its
folder. (`imagen_lightning.io.locks` frees its locks with the process that took them, so it cannot do this.) The sweep
touches the file while the process runs: how long a trial ran is known after a kill too.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG


@dataclass
class TrialProcess:
    """A running trial's process.

    Attributes:
        popen: of the process.
        log: where its output goes.
    """

    popen: subprocess.Popen[bytes]
    log: Path

    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self.popen.poll()

    def terminate(self) -> None:
        """Asks it to finish its step and end."""
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it and what it started."""
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, signal.SIGKILL)


def start(words: Sequence[str], environment: Mapping[str, str], log: Path, lock: Path) -> TrialProcess:
    """Starts a trial's command.

    Raises:
        OSError: there is no such program.
        BlockingIOError: a process of this trial still runs.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+b") as held, log.open("ab") as output:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        output.write(f"$ {' '.join(words)}\n".encode())
        output.flush()
        popen = subprocess.Popen(
            list(words),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which ends its trials in order
            pass_fds=(held.fileno(),),
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        held.truncate(0)
        held.write(str(popen.pid).encode())
        held.flush()
    return TrialProcess(popen, log)


def _end_with_parent() -> None:
    """Has the kernel send SIGTERM to this process when the sweep dies, so that it saves its checkpoint and ends."""
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)


def see(lock: Path) -> None:
    """Note that a trial's process runs."""
    with contextlib.suppress(FileNotFoundError):  # of a folder that somebody deletes
        os.utime(lock)


def last_seen(lock: Path) -> float:
    """Return when a trial's process was last known to run, in seconds of the disk's clock; 0 where nobody knows."""
    return max((path.stat().st_mtime for path in (lock, lock.with_suffix(".log")) if path.exists()), default=0.0)


def end_orphan(lock: Path, patience: float) -> None:
    """Waits for a killed sweep's process to end, asks it to, and after `patience` seconds kills it."""
    deadline, asked = time.monotonic() + patience, False
    while (pid := _holder(lock)) is not None:
        see(lock)
        late = time.monotonic() > deadline
        if pid and (late or not asked):
            asked = True
            try:
                if late:
                    os.killpg(pid, signal.SIGKILL)
                else:
                    os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                continue  # what it started still holds the file for a moment
        time.sleep(0.1)


def _holder(lock: Path) -> int | None:
    """The process that holds the file, 0 where it has not said which; None where none does."""
    try:
        file = lock.open("r+b")  # shared disks lock writable files alone
    except FileNotFoundError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(file.read() or b"0")
    return None


def log_end(log: Path, num_lines: int = 12) -> str:
    """The last lines of a log, for a record of what went wrong."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 8000))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(line[:300] for line in text.replace("\r", "\n").rstrip().splitlines()[-num_lines:])
