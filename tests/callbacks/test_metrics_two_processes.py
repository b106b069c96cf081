"""Metrics with two processes, uneven shares and one that has nothing: nothing hangs, and the numbers are one's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from imagen_lightning.callbacks import FID, KID, CaptionAccuracy, Probes, RunCSVLogger
from imagen_lightning.callbacks.sampled_metric import SampledMetric as SampledMetric
from imagen_lightning.data import shapes
from imagen_lightning.data.datamodule import LaionDataModule

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import imagen_lightning.torchvision_mend
import conftest
import test_metrics_two_processes as test

made = conftest.trainer(
    {run!r}, test.evaluations(), 2, devices=2, strategy="ddp", logger=test.RunCSVLogger({run!r})
)
made.fit(test.still(conftest.base_stage()), datamodule=test.data({shards!r}))
shares = [len(callback._given.own) for callback in made.callbacks if isinstance(callback, test.SampledMetric)]
assert shares[:3] == ([4, 2, 2] if made.global_rank == 0 else [2, 0, 1]), shares
"""


def data(shards):
    return LaionDataModule(*shards, image_size=8, batch_size=4)


def evaluations():
    """Of 7 validation images the second cannot be used: shares of 4 and 2, of 2 and none, of 2 prompts and one."""
    shared = {"every_n_steps": 2, "num_steps": 2, "batch_size": 1}  # a batch's size moves the last bits of an image
    prompts = [shapes.sample(0, number, "val")[1] for number in range(3)]
    return [
        FID(num_samples=7, **shared),
        CaptionAccuracy(num_samples=3, **shared),
        CaptionAccuracy(prompts=prompts, label="prompts", **shared),
        KID(num_samples=7, **shared),
        FID(num_samples=3, split="train", **shared),
        Probes(num_samples=16, every_n_steps=2),
    ]


def still(stage):
    """The stage, which no step moves: two processes' gradients are not one's to the last bit."""
    stage.optimization.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.0)
    return stage


@pytest.mark.slow
def test_two_processes_measure_what_one_does(fit, make_base, make_shards, tmp_path, read_rows, read_values):
    shards = [make_shards(tmp_path / "train.tar", range(8)), make_shards(tmp_path / "val.tar", range(7), broken=(1,))]
    one, two = tmp_path / "one", tmp_path / "two"
    fit(evaluations(), steps=2, stage=still(make_base()), datamodule=data(shards), folder=one, logger=RunCSVLogger(one))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), run=str(two), shards=shards))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    alone, together = read_values(one), read_values(two)
    assert len(alone) == 5 + 3
    for first, second in zip(alone, together, strict=True):
        assert (first["step"], first["name"]) == (second["step"], second["name"])
        assert first["value"]["protocol"] == second["value"]["protocol"]
        assert second["value"]["value"] == pytest.approx(first["value"]["value"], rel=1e-6)
    assert read_rows(two)[2] == pytest.approx(read_rows(one)[2], rel=1e-6)
    verdicts = [json.loads((folder / "verdict.json").read_text()) for folder in (one, two)]
    assert verdicts[0] == verdicts[1]
