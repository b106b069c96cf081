"""What the command line's tests share."""

import resource
import sys
from pathlib import Path

import pytest
from commands import make_workspace
from tiny_fit import write

from imagen_lightning.cli import quickstart, verify_resume
from imagen_lightning.cli.main import main


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work") / "here"
    make_workspace(folder)
    return folder


@pytest.fixture
def here(workspace, monkeypatch):
    """The workspace as working folder, with training and serving left out."""
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("HOME", str(workspace.parent))

    def ctrl_c(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("imagen_lightning.evaluation.compare.BallotServer.serve_forever", ctrl_c)
    monkeypatch.setattr("imagen_lightning.cli.sweep_check.check", lambda sweep: None)
    monkeypatch.setattr(verify_resume.Verification, "run", lambda self: True)
    monkeypatch.setattr(quickstart, "_make_plan", lambda seconds, seed: ctrl_c())
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**30, limits[1]))  # for what would read without end
    yield workspace
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """`cli("fit", "--run", …)`: the command in a folder that holds stage.yaml; gives the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")  # a run of its own takes W&B a second
    monkeypatch.setattr(sys, "argv", ["imagen-lightning"])
    write("stage.yaml")
    return lambda *arguments: main([str(argument) for argument in arguments])
