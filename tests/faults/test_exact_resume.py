"""A run that is stopped and resumed, on other numbers of workers and processes, is the uninterrupted run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from kill_harness import HERE, STEPS, Run, config, fork_server, write_shards

from imagen_lightning.callbacks.history import read_history
from imagen_lightning.cli.verify_resume import HISTORY, LOSSES, SEEN, compare_histories, compare_runs, table


@pytest.fixture(scope="module")
def server():
    with fork_server() as context:
        yield context


@pytest.mark.parametrize(
    ("data", "accumulate", "precision", "number"),
    [
        ("shards", 1, "32-true", signal.SIGTERM),
        ("shapes", 2, "32-true", signal.SIGUSR1),
        ("shards", 2, "bf16-mixed", signal.SIGINT),
    ],
)
def test_bitwise_on_any_number_of_workers(server, tmp_path, data, accumulate, precision, number):
    """With dropout, random crops and flips, captions to choose from, broken samples, accumulation, validation, EMA,
    warm-up and cosine descent."""
    write_shards(tmp_path / "shards")
    settings = config(data, tmp_path / "shards", accumulate)
    settings["trainer"]["precision"] = precision
    whole = Run(server, tmp_path / "whole", settings)
    whole.finish()
    signals = {"steps": [5, 12, 19], "number": int(number)}
    run = Run(server, tmp_path / "parts", settings, callbacks={"Signals": signals})
    for step, workers in ((5, 0), (12, 2), (19, 4)):
        run.workers = workers
        assert number.name in run.finish(exit_code=128 + number)
        content = torch.load(run.run / "checkpoints" / "last.ckpt", weights_only=True)
        (position,) = {
            value["position"] for value in content.values() if isinstance(value, dict) and "position" in value
        }
        assert position == 4 * accumulate * step
    run.workers = 0
    run.finish()
    found = compare_runs(whole.run, run.run)
    assert {"weights", "optimizer", "learning rate schedule", SEEN} <= {item.what for item in found}
    assert all(item.largest == 0.0 for item in found), table(found)
    history = read_history(run.run / HISTORY)
    assert [step.positions[0] for step in history] == list(range(0, 4 * accumulate * STEPS, 4 * accumulate))
    if data == "shards":  # in epochs of the 36 whole samples and the three that others stand in for
        epoch = [key for step in history for key in step.keys][:39]
        assert len(set(epoch)) >= 36


@pytest.mark.slow
def test_the_same_samples_and_losses_on_other_numbers_of_processes(tmp_path):
    """1, then 2, then 1 process at one global batch, without dropout, in float32."""
    write_shards(tmp_path / "shards")
    settings = config("shards", tmp_path / "shards", 2)
    settings["model"]["init_args"]["network"]["init_args"]["dropout"] = 0.0
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}

    def fit(name, callbacks, *more, exit_code=0):
        history = {"class_path": "imagen_lightning.callbacks.history.SampleHistory"}
        history["init_args"] = {"path": f"{name}/{HISTORY}"}
        settings["trainer"]["callbacks"] = [history, *callbacks]
        Path(tmp_path, "stage.yaml").write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "imagen_lightning", "fit", "--config", "stage.yaml", "--run", name, "--resume"]
        done = subprocess.run(
            [*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == exit_code, done.stderr[-3000:]

    fit("whole", [])
    signals = {"steps": [8, 16], "number": int(signal.SIGTERM)}
    stop = [{"class_path": "kill_harness.Signals", "init_args": signals}]
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    fit("parts", stop, exit_code=143)
    fit("parts", stop, *two, exit_code=143)
    fit("parts", stop, "--trainer.devices", "1", "--trainer.strategy", "auto")
    whole, parts = read_history(tmp_path / "whole" / HISTORY), read_history(tmp_path / "parts" / HISTORY)
    assert len(whole) == len(parts) == STEPS
    found = dict(compare_histories(whole, parts))
    print(f"largest difference of a sample's loss: {found[LOSSES]:.2e}")
    assert found[SEEN] == 0.0
    assert 0 < found[LOSSES] <= 1e-6
