"""Sweep files over a fast program, and the command that runs them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("program.py")


class Sweeps:
    """Sweeps in a temporary folder."""

    def __init__(self, folder):
        self.folder = folder
        self.out = folder / "out"
        self.begun = []

    def write(self, name="sweep.yaml", **content):
        base = {
            "name": "tried",
            "program": str(PROGRAM),
            "method": "grid",
            "metric": {"name": "loss", "goal": "minimize"},
            "parameters": {"x": {"values": [1, 2, 3, 4]}},
        }
        path = self.folder / name
        path.write_text(yaml.safe_dump(base | content, sort_keys=False))
        return path

    def start(self, file, *options, out=None, **environment):
        words = [sys.executable, "-m", "imagen_lightning", "sweep", file, "--out", out or self.out, *options]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(
            [str(word) for word in words],
            env=os.environ | {"PYTHONPATH": path} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.begun.append(process)
        return process

    def run(self, file, *options, code=0, **more):
        process = self.start(file, *options, **more)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == code, output
        return output

    def trials(self, study=None):
        storage = study or f"sqlite:///{self.out / 'study.db'}"
        return optuna.load_study(study_name="tried", storage=storage).get_trials()

    def starts(self, number, out=None):
        path = (out or self.out) / "trials" / f"{number:04d}" / "starts"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def sweeps(tmp_path):
    made = Sweeps(tmp_path)
    yield made
    for process in made.begun:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture
def wait():
    """Waits until something is so."""

    def until(condition, seconds=60):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not come about"
            time.sleep(0.05)

    return until
