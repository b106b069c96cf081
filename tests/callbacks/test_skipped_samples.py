"""Counts of skipped samples in metrics.csv, against what the shards were given."""

import csv
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from imagen_lightning.callbacks import RunCSVLogger, SkippedSamples
from imagen_lightning.data.datamodule import LaionDataModule, ShapesDataModule
from imagen_lightning.types import InputError


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, _):
        return self.weight * batch.images.float().mean()

    def validation_step(self, batch, _):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def write_shard(path, num_samples, broken=(), silent=()):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    with tarfile.open(path, "w") as tar:
        for number in range(num_samples):
            members = {"png": b"broken" if number in broken else buffer.getvalue(), "txt": b"a"}
            for suffix, data in members.items():
                if suffix == "txt" and number in silent:
                    continue
                info = tarfile.TarInfo(f"{number:03d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def fit(run, data, steps, *callbacks, **settings):
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=RunCSVLogger(str(run)),
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1000,
        default_root_dir=run,
        **{"limit_val_batches": 0, **settings},
    )
    trainer.fit(Model(), datamodule=data)


def rows(run):
    """Step to the metrics logged there."""
    with (run / "metrics.csv").open() as file:
        return {
            int(row.pop("step")): {key: float(value) for key, value in row.items() if value}
            for row in csv.DictReader(file)
        }


def test_counts_reach_the_loggers_when_they_change_and_at_the_end(tmp_path):
    shard = write_shard(tmp_path / "a.tar", 40, broken=(3, 21), silent=(7,))
    val = write_shard(tmp_path / "b.tar", 4, broken=(1,))
    data = LaionDataModule(shard, val, image_size=8, batch_size=4, max_skip_share=0.5)
    fit(tmp_path, data, 25, SkippedSamples(4), limit_val_batches=1.0, val_check_interval=6, num_sanity_val_steps=0)
    logged = rows(tmp_path)
    found = {"data/skipped/no_caption": 1.0}
    assert logged[0] == found  # the walk's, before any step
    assert all(step == 0 or (step + 1) % 4 == 0 or step == 24 for step in logged)
    totals = [row.get("data/skipped/undecodable", 0) for row in logged.values()]
    assert totals == sorted(set(totals))  # each row tells something new
    last = {**found, "data/skipped/undecodable": 2.0, "data/skipped_val/undecodable": 1.0}
    assert {key: value for row in logged.values() for key, value in row.items()} == last


def test_counts_are_logged_where_an_error_ends_the_run(tmp_path):
    class Fail(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 10:
                raise InputError("no more")

    data = LaionDataModule(
        write_shard(tmp_path / "a.tar", 40, broken=range(0, 40, 5)), image_size=8, batch_size=4, max_skip_share=0.5
    )
    with pytest.raises(InputError, match="no more"):
        fit(tmp_path, data, 20, SkippedSamples(1000), Fail())
    (row,) = rows(tmp_path).values()
    assert row == {"data/skipped/undecodable": float(sum(data.train_skips.counts.values()))}


def test_a_run_that_is_refused_logs_nothing(tmp_path):
    data = LaionDataModule(write_shard(tmp_path / "a.tar", 3, silent=range(3)), image_size=8, batch_size=2)
    with pytest.raises(InputError, match="cannot be used"):
        fit(tmp_path, data, 2, SkippedSamples())
    assert rows(tmp_path) == {}


def test_data_without_counts_logs_nothing(tmp_path):
    fit(tmp_path, ShapesDataModule(8, 4), 3, SkippedSamples(1))
    assert rows(tmp_path) == {}


def test_it_refuses_a_rate_of_nothing():
    with pytest.raises(InputError, match="every_n_steps 0 must be at least 1"):
        SkippedSamples(0)


SCRIPT = """
import sys
import imagen_lightning.torchvision_mend
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_skipped_samples import *

run = Path({run!r})
data = LaionDataModule(str(run / "a.tar"), image_size=8, batch_size=4, max_skip_share=0.5)
fit(run, data, 20, SkippedSamples(5), devices=2, strategy="ddp")
"""


@pytest.mark.slow
def test_processes_add_up(tmp_path):
    write_shard(tmp_path / "a.tar", 80, broken=(8, 30, 61), silent=(1, 2, 3))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), run=str(tmp_path)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    last = {key: value for row in rows(tmp_path).values() for key, value in row.items()}
    assert last["data/skipped/no_caption"] == 3  # found by both processes, counted once
    listed = {line for line in (tmp_path / "skipped.jsonl").read_text().splitlines() if "undecodable" in line}
    assert last["data/skipped/undecodable"] == len(listed) == 3  # one epoch: each met by one process
