"""Every command with a terminal that lacks characters, a closed or full output, a full disk, a folder in use."""

import io
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import COMMANDS, TRAINERS, VALID, arguments_of, argv_of, listing, remove

from imagen_lightning.cli.main import main
from imagen_lightning.io.locks import LOCK, locked

RUNNING = [command for command in COMMANDS if command not in ("import-diffusers", "export")]  # these need pipelines
WRITING = [command for command in RUNNING if "OUT" in str(VALID[command].get("out")) and command != "quickstart"]
HELD = ["quickstart", "compare", "verify-resume"]  # write to a folder over time; others' tests have theirs


def code_of(argv):
    try:
        return main(argv)
    except SystemExit as end:
        return end.code or 0


def refusal(capsys, argv):
    capsys.readouterr()
    assert code_of(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("imagen-lightning: error: ")
    return line


@pytest.mark.parametrize("command", RUNNING)
def test_any_terminal_can_show_it(command, here, monkeypatch):
    before = listing(here)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert code_of([*command.split(), "--help"]) == 0
    assert code_of(argv_of(command)) in (0, 130)
    remove(listing(here) - before)
    err.flush()
    printed = out.buffer.getvalue() + err.buffer.getvalue()
    assert b"usage: imagen-lightning" in printed
    assert b"\\u" not in printed  # each character has a stand-in


@pytest.mark.parametrize("command", TRAINERS)
def test_any_terminal_can_show_the_trainers_help(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert code_of([command, "--help"]) == 0


def test_a_refusal_with_any_character_can_be_shown(here, monkeypatch):
    err = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["sample", "日本語…\x1b", "--prompt", "x"]) == 2
    err.flush()
    assert b"..." in err.buffer.getvalue()
    assert b"\\u65e5" in err.buffer.getvalue()
    assert b"\x1b" not in err.buffer.getvalue()


@pytest.mark.parametrize("command", RUNNING)
def test_closed_and_full_output(command, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert code_of([*command.split(), "--help"]) == 0
        sys.stdout.close()
    with monkeypatch.context() as patch, open("/dev/full", "w") as full:
        patch.setattr(sys, "stdout", full)
        line = refusal(capsys, [*command.split(), "--help"])
    assert "standard output cannot be written: No space left on device" in line


def test_closed_and_full_output_of_a_process():
    """What a test's own streams cannot show: Python's end, and the numbers of closed files."""
    command = f"{sys.executable} -m imagen_lightning --version"
    script = f"{command} >&-; echo $?; {command} >&- 2>&- <&-; echo $?; {command} > /dev/full; echo $?; "
    script += f"{command} --x > /dev/full 2>&1; echo $?; "
    script += f"LC_ALL=C PYTHONIOENCODING=ascii {command.replace('--version', '…')}; echo $?"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["0", "0", "2", "2", "2"]
    assert len(done.stderr.splitlines()) == 2, done.stderr
    assert "Traceback" not in done.stderr


@contextmanager
def full_disk():
    """No file may grow: writing fails as on a full disk, for root too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("command", WRITING)
def test_a_full_disk_is_one_line(command, here, capsys):
    before = listing(here)
    with full_disk():
        code = code_of(argv_of(command))
    lines = capsys.readouterr().err.splitlines()
    left = [path for path in listing(here) - before if path.is_file() and path.stat().st_size]
    remove(listing(here) - before)
    if command == "verify-resume":  # writes no file but its lock's
        assert code == 2
    assert (code, left) == (2, [])
    assert lines[-1].startswith("imagen-lightning: error: ")
    assert "OUT" in lines[-1]
    assert "too large" in lines[-1]
    assert not any("Traceback" in line for line in lines)


@pytest.mark.parametrize("command", [c for c in RUNNING if "out" in arguments_of(c) and c != "sweep"])
@pytest.mark.parametrize("out", ["empty/OUT.html", "/proc/OUT.html", "/dev/null/OUT.html", "x" * 300])
def test_an_output_that_cannot_be_made_is_one_line(command, out, here, capsys):
    before = listing(here)
    line = refusal(capsys, argv_of(command, out=out))
    assert out[:10] in line
    assert listing(here) == before


@pytest.mark.parametrize("command", HELD)
def test_a_folder_in_use_says_by_whom_and_stays(command, here, capsys):
    before = listing(here)
    try:
        with locked(Path("OUT") / LOCK, "it"):
            held = listing(here)
            assert f"is in use by process {os.getpid()} on" in refusal(capsys, argv_of(command))
            assert listing(here) == held
    finally:
        remove(listing(here) - before)


@pytest.mark.parametrize("command", HELD)
def test_a_folder_of_something_else_gets_no_lock(command, here, capsys):
    before = listing(here)
    refusal(capsys, argv_of(command, out="images"))
    assert listing(here) == before
