"""What the command line's tests share."""

import sys

import pytest
from tiny_fit import write

from imagen_lightning.cli.main import main


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """`cli("fit", "--run", …)`: the command in a folder that holds stage.yaml; gives the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")  # a run of its own takes W&B a second
    monkeypatch.setattr(sys, "argv", ["imagen-lightning"])
    write("stage.yaml")
    return lambda *arguments: main([str(argument) for argument in arguments])
