"""All callbacks with two processes: nothing hangs, files are written once, a signal to either process ends both."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import imagen_lightning.torchvision_mend
from lightning.pytorch import Callback
import conftest
from imagen_lightning.callbacks import *

class Interrupt(Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 4 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

callbacks = [EMA(), FiniteLoss(), NoiseLevelLoss(2, 2), Throughput(2), SampleGrid(num_images=3, every_n_steps=2)]
settings = dict(limit_val_batches=1.0, val_check_interval=3, check_val_every_n_epoch=None, log_every_n_steps=1)
trainer = conftest.trainer(
    {run!r}, [*callbacks, Interrupt(), Checkpoint(every_n_steps=2)], 50, accelerator="cpu", devices=2, strategy="ddp",
    logger=RunCSVLogger({run!r}), **settings,
)
trainer.fit(conftest.sr_stage(), datamodule=conftest.data())
assert interrupted(trainer) == signal.SIGTERM and trainer.global_step == 5
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    run = tmp_path / "run"
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), run=str(run)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["0000002", "0000004"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["last.ckpt", "step-4.ckpt", "step-5.ckpt"]
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert len(checkpoint["callbacks"]["Checkpoint"]["rng"]) == 2
    assert checkpoint["ShapesDataModule"]["position"] == 20
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4"]
    means = {key: float(row[key]) for row in rows for key in row if key.startswith("val/loss") and row[key]}
    assert means["val/loss"] > 0
    assert any(key.startswith("val/loss_aug/") for key in means)
