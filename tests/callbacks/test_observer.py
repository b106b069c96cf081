"""No callback that measures or draws ends a training, or changes it, by failing."""

import inspect
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from imagen_lightning import callbacks
from imagen_lightning.callbacks import (
    FID,
    KID,
    CaptionAccuracy,
    CLIPScore,
    NoiseLevelLoss,
    Probes,
    RunCSVLogger,
    SampleGrid,
    SkippedSamples,
    StepProgress,
    Throughput,
)
from imagen_lightning.callbacks.observer import FAILURES, Observer
from imagen_lightning.types import InputError

OFTEN = {"every_n_steps": 2, "num_steps": 1}
# These change or guard what is trained: their errors end it.
ACTING = {"EMA", "Checkpoint", "EncodeOnce", "FiniteLoss"}


class Clip:
    """In the place of CLIP: four features."""

    name, sha256, resize_filter = "clip", "0", "none"

    def __call__(self, images):
        return torch.ones(len(images), 4)

    def text_features(self, captions, device="cpu"):
        return torch.ones(len(captions), 4)


# By class: how it is made, and where an exception is planted.
OBSERVERS = {
    FID: (lambda **more: FID(num_samples=4, **OFTEN, **more), ("look", "value", "_draw")),
    KID: (lambda **more: KID(num_samples=4, **OFTEN, **more), ("look", "value")),
    CLIPScore: (lambda **more: CLIPScore(Clip(), num_samples=4, **OFTEN, **more), ("look", "value")),
    CaptionAccuracy: (lambda **more: CaptionAccuracy(num_samples=4, **OFTEN, **more), ("look", "value")),
    NoiseLevelLoss: (lambda **more: NoiseLevelLoss(every_n_steps=2, **more), ("_add", "_log")),
    Probes: (lambda **more: Probes(num_samples=16, **OFTEN, **more), ("_look", "_findings")),
    SampleGrid: (lambda **more: SampleGrid(["a", "b"], **OFTEN, **more), ("_draw", "_write")),
    SkippedSamples: (lambda **more: SkippedSamples(every_n_steps=1, **more), ("_total", "_log")),
    StepProgress: (StepProgress, ("_show",)),
    Throughput: (lambda **more: Throughput(every_n_steps=1, **more), ("_count", "_restart")),
}
PLANTED = [(kind, name) for kind, (_, names) in OBSERVERS.items() for name in names]


class Oops(Exception):
    pass


PLANT = Oops("planted")


def breaking(kind, name, error):
    """A callback of the kind whose method `name` draws random numbers, does its work, and then fails."""

    def broken(self, *args, **kwargs):
        torch.rand(3)
        method(self, *args, **kwargs)
        raise error

    method = getattr(kind, name)
    return type(kind.__name__, (kind,), {name: broken})


def made(kind, name, monkeypatch, error=PLANT, **more):
    broken = breaking(kind, name, error)
    monkeypatch.setattr(sys.modules[__name__], kind.__name__, broken)
    return broken() if kind.__name__ == "StepProgress" else OBSERVERS[kind][0](**more)


def test_every_exported_callback_is_an_observer_or_acts():
    exported = {getattr(callbacks, name) for name in callbacks.__all__}
    found = {item for item in exported if inspect.isclass(item) and issubclass(item, Callback)}
    assert {item.__name__ for item in found if not issubclass(item, Observer)} == ACTING
    assert {item for item in found if issubclass(item, Observer)} == set(OBSERVERS)
    takes_strict = {item for item in OBSERVERS if "strict" in inspect.signature(item.__init__).parameters}
    by_options = {FID, KID, CLIPScore, CaptionAccuracy}
    assert takes_strict | by_options == set(OBSERVERS) - {StepProgress}


def fingerprint(stage):
    return torch.cat([value.detach().flatten().double() for value in stage.state_dict().values()])


def settings(folder):
    validated = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}
    return {"logger": RunCSVLogger(str(folder)), "log_every_n_steps": 1, "folder": folder, **validated}


@pytest.fixture
def alone(fit, tmp_path, _known={}):  # noqa: B006 (found once)
    """The weights of the training without any callback."""
    if not _known:
        _known["weights"] = fingerprint(fit([], 3, **settings(tmp_path / "alone"))[0])
    return _known["weights"]


@pytest.mark.parametrize(("kind", "name"), PLANTED, ids=lambda item: item if isinstance(item, str) else item.__name__)
def test_a_failing_observer_changes_nothing(fit, tmp_path, alone, monkeypatch, caplog, kind, name):
    callback = made(kind, name, monkeypatch)
    with caplog.at_level(logging.WARNING, "imagen_lightning.callbacks.observer"):
        bar = {"enable_progress_bar": kind.__name__ == "StepProgress"}
        stage, trainer = fit([callback], 3, **settings(tmp_path), **bar)
    assert trainer.global_step == 3
    assert torch.equal(fingerprint(stage), alone)
    (said,) = [record.getMessage() for record in caplog.records if "training continues" in record.getMessage()]
    assert f"{kind.__name__} failed at step" in said
    assert "Oops: planted" in said
    (line,) = (tmp_path / FAILURES).read_text().splitlines()  # once, though it failed more than once
    assert json.loads(line) | {"step": 0} == {"step": 0, "callback": kind.__name__, "error": "Oops: planted"}


@pytest.mark.parametrize("kind", [kind for kind in OBSERVERS if kind is not StepProgress])
def test_a_strict_one_ends_the_training(fit, tmp_path, monkeypatch, kind):
    callback = made(kind, OBSERVERS[kind][1][0], monkeypatch, strict=True)
    with pytest.raises(Oops, match="planted"):
        fit([callback], 3, **settings(tmp_path))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_signals_are_not_swallowed(fit, tmp_path, monkeypatch, error):
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit([made(FID, "look", monkeypatch, error)], 3, **settings(tmp_path))


def test_what_is_configured_wrong_is_refused_before_training(fit, tmp_path):
    with pytest.raises(InputError, match="shapes alone"):
        fit([CaptionAccuracy(prompts=["no shape", "none"], **OFTEN)], 3, **settings(tmp_path))
    assert not (tmp_path / FAILURES).exists()


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import imagen_lightning.torchvision_mend
from test_observer import *
from conftest import base_stage, data, trainer

class OnOne(FID):
    def look(self, images, given):
        if torch.distributed.get_rank() == 1:
            raise ValueError("on one process")
        return super().look(images, given)

class Half(NoiseLevelLoss):
    def _add(self, *args):
        if torch.distributed.get_rank() == 1:
            raise ValueError("on one process")
        super()._add(*args)

folder = Path({run!r})
options = settings(folder)
options.pop("folder")
observers = [OnOne(num_samples=4, **OFTEN), KID(num_samples=4, **OFTEN), Half(every_n_steps=1)]
made = trainer(folder, observers, 3, devices=2, strategy="ddp", **options)
made.fit(base_stage(), datamodule=data())
assert made.global_step == 3
"""


@pytest.mark.slow
def test_a_failure_in_one_process_leaves_none_waiting(tmp_path):
    script, run = tmp_path / "script.py", tmp_path / "run"
    run.mkdir()
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), run=str(run)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (run / FAILURES).read_text().splitlines()
    assert json.loads(line)["error"] == "RuntimeError: process 1: ValueError: on one process"
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert "base/kd-random" in header
    assert "base/fd-random" not in header
