"""One process at a time, by name; a killed holder's lock is free at once."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from imagen_lightning.errors import InputError
from imagen_lightning.io.locks import describe_holder, holder_path, locked

HOLD = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    from imagen_lightning.io.locks import locked
    with locked(Path(sys.argv[1]), "folder"):
        if os.fork() == 0:
            print("held", flush=True)
            time.sleep(60)
        time.sleep(60)
    """
)


@pytest.fixture
def holder(tmp_path):
    """A process, with a forked child of its own, that holds tmp_path/.lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_a_second_process_is_told_who_holds_the_lock(tmp_path, holder):
    message = rf"runs/a is in use by process {holder.pid} on .* since .*; wait for its end"
    with pytest.raises(InputError, match=message), locked(tmp_path / ".lock", "runs/a"):
        pass
    assert str(holder.pid) in describe_holder(tmp_path / ".lock")


def test_a_killed_holder_leaves_no_lock_though_its_child_lives(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with locked(tmp_path / ".lock", "runs/a"):
        assert f"process {os.getpid()} " in describe_holder(tmp_path / ".lock")
    assert not holder_path(tmp_path / ".lock").exists()


def test_the_lock_is_free_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path / ".lock", "x"):
        raise RuntimeError
    with locked(tmp_path / ".lock", "x"), pytest.raises(InputError, match="in use"), locked(tmp_path / ".lock", "x"):
        pass


def test_a_damaged_record_of_the_holder_is_no_error(tmp_path):
    with locked(tmp_path / ".lock", "x"):
        holder_path(tmp_path / ".lock").write_text("{")
        assert describe_holder(tmp_path / ".lock") == "another process"
