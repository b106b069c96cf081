"""When checkpoints are written, that they are whole, and that a run resumed from one is the uninterrupted run."""

import csv
import os
import random
import shutil
import signal
import zipfile

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.environments import SLURMEnvironment

from imagen_lightning.callbacks import (
    EMA,
    Checkpoint,
    NoiseLevelLoss,
    NonFiniteWeightsError,
    RunCSVLogger,
    find_last,
    interrupted,
)
from imagen_lightning.callbacks.checkpoint import WholeFileIO, is_finished
from imagen_lightning.data.datamodule import ShapesDataModule
from imagen_lightning.types import InputError


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def load(path):
    return torch.load(path, weights_only=True)


class Do(Callback):
    """Calls a function after the n-th batch."""

    def __init__(self, at, action):
        self.at, self.action, self.count = at, action, 0

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.count += 1
        if self.count == self.at:
            self.action(trainer, pl_module)


def test_written_every_n_steps_and_the_newest_kept(fit, tmp_path):
    fit([Checkpoint(every_n_steps=2, keep=2)], steps=7)
    assert names(tmp_path) == ["last.ckpt", "step-6.ckpt", "step-7.ckpt"]
    assert load(tmp_path / "checkpoints/last.ckpt")["global_step"] == 7
    assert find_last(tmp_path).name == "step-7.ckpt"


def test_an_older_one_goes_only_when_the_newer_is_whole(fit, tmp_path, monkeypatch):
    written = []
    save = torch.save

    def watched(checkpoint, file):
        written.append([name for name in names(tmp_path) if not name.endswith(".partial")])
        if len(written) == 3:
            file.write(b"half")
            raise OSError("disk full")
        save(checkpoint, file)

    monkeypatch.setattr(torch, "save", watched)
    with pytest.raises(OSError, match="disk full"):
        fit([Checkpoint(every_n_steps=1, keep=1)], steps=4)
    assert written[2] == ["step-2.ckpt"]
    assert names(tmp_path) == ["step-2.ckpt"]
    assert load(find_last(tmp_path))["global_step"] == 2


def test_only_after_optimizer_steps_and_after_the_average(fit, tmp_path):
    # listed before the EMA, moved behind it
    checkpoint, ema = Checkpoint(every_n_steps=2, keep=9), EMA()
    fit([checkpoint, ema], steps=4, accumulate_grad_batches=3)
    assert names(tmp_path) == ["last.ckpt", "step-2.ckpt", "step-4.ckpt"]
    for step in (2, 4):
        content = load(tmp_path / f"checkpoints/step-{step}.ckpt")
        assert content["averaging_state"]["n_averaged"] == step
        assert content["ShapesDataModule"]["position"] == 4 * 3 * step


@pytest.mark.parametrize("settings", [{"limit_train_batches": 3, "max_epochs": 2, "steps": -1}, {"steps": 6}])
def test_the_last_one_holds_the_trained_weights(fit, tmp_path, settings):
    kept = {}
    keep = Do(6, lambda trainer, module: kept.update({k: v.clone() for k, v in module.state_dict().items()}))
    stage, _ = fit([EMA(), keep, Checkpoint(every_n_steps=100)], **settings)
    assert names(tmp_path) == ["last.ckpt", "step-6.ckpt"]
    content = load(tmp_path / "checkpoints/last.ckpt")
    assert all(torch.equal(content["current_model_state"][name], kept[name]) for name in kept)
    assert all(torch.equal(content["state_dict"][name], value) for name, value in stage.state_dict().items())
    assert any(not torch.equal(content["state_dict"][name], kept[name]) for name in kept)


@pytest.mark.parametrize("validating", [False, True])
def test_resume_is_the_uninterrupted_run(fit, make_base, tmp_path, validating):
    settings = {"limit_val_batches": 1, "val_check_interval": 3, "check_val_every_n_epoch": None} if validating else {}

    def run(steps, **more):
        stage = make_base(dropout=0.5)
        return fit([EMA(), Checkpoint(every_n_steps=3)], steps, stage, **settings, **more)[0].state_dict()

    whole = run(6, folder=tmp_path / "whole")
    run(3, folder=tmp_path / "parts")
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    resumed = run(6, folder=tmp_path / "parts", resume=find_last(tmp_path / "parts"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert names(tmp_path / "parts") == ["last.ckpt", "step-3.ckpt", "step-6.ckpt"]


class Snapshots(WholeFileIO):
    """Copies the run folder after each checkpoint: what a run leaves that is killed there."""

    def __init__(self, to):
        super().__init__()
        self.to = to

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        super().save_checkpoint(checkpoint, path, storage_options)
        shutil.copytree(path.parents[1], self.to / path.stem)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_killed_right_after_a_checkpoint_loses_nothing(fit, make_base, tmp_path, accumulate):
    def run(folder, **more):
        callbacks = [EMA(), NoiseLevelLoss(4, 3), EarlyStopping("val/loss", patience=9), Checkpoint(every_n_steps=2)]
        settings = {"limit_val_batches": 1.0, "val_check_interval": 2 * accumulate, "check_val_every_n_epoch": None}
        settings |= {"logger": RunCSVLogger(str(folder)), "log_every_n_steps": 1, "num_sanity_val_steps": 0}
        settings |= {"accumulate_grad_batches": accumulate}
        fit(callbacks, 6, make_base(dropout=0.5), folder=folder, **settings, **more)
        return load(folder / "checkpoints" / "last.ckpt"), (folder / "metrics.csv").read_text()

    (tmp_path / "snapshots").mkdir()
    whole, metrics = run(tmp_path / "whole", plugins=[Snapshots(tmp_path / "snapshots")])
    rows = list(csv.DictReader(metrics.splitlines()))
    assert [bool(row["val/loss"]) for row in rows] == [False, True] * 3
    assert [any(row[name] for name in row if name.startswith("train/loss_t/")) for row in rows] == [0, 0, 1] * 2
    for step in (2, 4, 6):
        folder = tmp_path / "snapshots" / f"step-{step}"
        assert (folder / "metrics.csv").read_text().count("\n") == 1 + step
        path = find_last(folder)
        assert not (folder / "checkpoints" / "last.ckpt").exists()
        resumed, again = run(folder, resume=path)
        assert again == metrics
        assert_same(resumed, whole, but=["loops"])
        assert is_finished(folder, find_last(folder))
    random.seed(3)  # nothing of a run's end is done twice
    before = metrics, (tmp_path / "whole/checkpoints/last.ckpt").read_bytes()
    run(tmp_path / "whole", resume=tmp_path / "whole/checkpoints/last.ckpt")
    assert (tmp_path / "whole/metrics.csv").read_text() == before[0]
    assert (tmp_path / "whole/checkpoints/last.ckpt").read_bytes() == before[1]


def assert_same(first, second, but=(), place=""):
    """Two checkpoints are equal to the bit."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first.keys() - set(but):
            assert_same(first[key], second[key], but, f"{place}/{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), place
        for number, (a, b) in enumerate(zip(first, second)):
            assert_same(a, b, but, f"{place}/{number}")
    else:
        assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second, place


def test_resume_from_lightning_s_own_checkpoints(fit, make_base, tmp_path):
    """Those of every n steps, of validation and of the end hold the position too, and all that makes a run exact."""

    def run(folder, callbacks=(), **more):
        settings = {"limit_val_batches": 1.0, "val_check_interval": 6, "check_val_every_n_epoch": None}
        settings |= {"accumulate_grad_batches": 2, "num_sanity_val_steps": 0}
        fit(
            [EMA(), Checkpoint(every_n_steps=4), *callbacks],
            9,
            make_base(dropout=0.5),
            folder=folder,
            **settings,
            **more,
        )
        return load(folder / "checkpoints" / "last.ckpt")

    own = [
        ModelCheckpoint(tmp_path / "own", "steps-{step}", every_n_train_steps=2, save_top_k=-1, save_last=True),
        ModelCheckpoint(tmp_path / "own", "val-{step}", monitor="val/loss", save_top_k=-1),
    ]
    whole = run(tmp_path / "whole", own)
    whole["callbacks"] = {name: state for name, state in whole["callbacks"].items() if "ModelCheckpoint" not in name}
    kinds = ["last.ckpt", *(f"steps-step={n}.ckpt" for n in (2, 4, 6, 8)), *(f"val-step={n}.ckpt" for n in (3, 6, 9))]
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == sorted(kinds)
    for name in kinds:
        content = load(tmp_path / "own" / name)
        step = content["global_step"]
        assert content["ShapesDataModule"]["position"] == 4 * 2 * step
        if step < 9:
            resumed = run(tmp_path / name, resume=tmp_path / "own" / name)
            assert_same(resumed, whole, but=["loops"])


def test_the_precision_scaler_goes_on(fit, make_base, tmp_path):
    """Scaled fp16, which has a CPU's kernels too."""

    def run(steps, folder, **more):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        fit(
            [EMA(), Checkpoint(every_n_steps=2)], steps, make_base(dropout=0.5), folder=folder, plugins=[plugin], **more
        )
        return load(folder / "checkpoints" / "last.ckpt")

    whole = run(10, tmp_path / "whole")
    parts = run(5, tmp_path / "parts")
    assert parts["MixedPrecision"]["scale"] < 2.0**24
    assert whole["MixedPrecision"] != parts["MixedPrecision"]
    assert_same(run(10, tmp_path / "parts", resume=find_last(tmp_path / "parts")), whole, but=["loops"])


def test_global_random_states_return(fit, tmp_path):
    drawn = []

    def draw(*_):
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))  # noqa: NPY002

    fit([Do(1, draw), Do(3, draw), Checkpoint(every_n_steps=2)], steps=3)
    fit([Do(1, draw), Checkpoint()], steps=3, resume=tmp_path / "checkpoints/step-2.ckpt")
    assert drawn[0] != drawn[1] == drawn[2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_finishes_the_step_and_saves(fit, tmp_path, number, capfd):
    class Interrupt(Callback):
        def on_before_optimizer_step(self, trainer, *_):
            if trainer.global_step == 1:
                before = list((tmp_path / "checkpoints").glob("*"))
                os.kill(os.getpid(), number)
                assert list((tmp_path / "checkpoints").glob("*")) == before  # nothing is saved inside the signal

        def on_validation_start(self, trainer, *_):
            assert trainer.sanity_checking

    previous = signal.getsignal(number)
    settings = {"limit_val_batches": 1, "val_check_interval": 50, "check_val_every_n_epoch": None}
    _, made = fit([EMA(), Interrupt(), Checkpoint()], steps=50, **settings)
    assert made.global_step == 2
    assert interrupted(made) == number
    assert signal.getsignal(number) == previous
    assert names(tmp_path) == ["last.ckpt", "step-2.ckpt"]
    assert number.name in capfd.readouterr().err
    content = load(find_last(tmp_path))
    assert any(not torch.equal(content["current_model_state"][k], v) for k, v in content["state_dict"].items())


class Spoilt(ShapesDataModule):
    """Refuses the batch that begins at a position."""

    def __init__(self, position=None):
        super().__init__(image_size=8, batch_size=4, num_val=6)
        self.refused = position

    def on_before_batch_transfer(self, batch, dataloader_idx):
        if int(batch.positions[0]) == self.refused:
            raise InputError("too many bad images")
        return super().on_before_batch_transfer(batch, dataloader_idx)


def test_a_refused_batch_costs_no_steps(fit, make_base, tmp_path):
    def run(steps, data=None, **more):
        return fit([EMA(), Checkpoint()], steps, make_base(dropout=0.5), data, **more)[0].state_dict()

    whole = run(5, folder=tmp_path / "whole")
    parts = tmp_path / "parts"
    with pytest.raises(InputError, match="too many"):
        run(5, Spoilt(12), folder=parts)
    assert names(parts) == ["last.ckpt", "step-3.ckpt"]
    before = {path: path.read_bytes() for path in (parts / "checkpoints").iterdir()}
    with pytest.raises(InputError, match="too many"):
        run(5, Spoilt(12), folder=parts, resume=find_last(parts))
    assert {path: path.read_bytes() for path in (parts / "checkpoints").iterdir()} == before
    resumed = run(5, Spoilt(), folder=parts, resume=find_last(parts))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_nothing_is_saved_of_gradients_that_accumulate(fit, tmp_path):
    with pytest.raises(InputError, match="too many"):
        fit([EMA(), Checkpoint()], 9, datamodule=Spoilt(40), accumulate_grad_batches=3)
    assert not (tmp_path / "checkpoints").exists()
    with pytest.raises(InputError, match="too many"):
        fit([EMA(), Checkpoint()], 9, datamodule=Spoilt(36), accumulate_grad_batches=3)
    assert names(tmp_path) == ["last.ckpt", "step-3.ckpt"]


def test_slurm_saves_nothing_inside_the_signal(fit, tmp_path, monkeypatch):
    for name, value in {"NTASKS": 1, "LOCALID": 0, "PROCID": 0, "NODEID": 0, "JOB_ID": 7, "NNODES": 1}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))

    def warn(trainer, module):
        assert signal.getsignal(signal.SIGUSR1).__self__ is checkpoint
        os.kill(os.getpid(), signal.SIGUSR1)

    checkpoint, slurm = Checkpoint(), SLURMEnvironment(auto_requeue=True)
    _, made = fit([Do(2, warn), checkpoint], steps=9, plugins=[slurm])
    assert made._accelerator_connector.cluster_environment is slurm
    assert made.global_step == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]  # and no hpc_ckpt


def test_a_second_interrupt_stops_at_once(fit, tmp_path):
    def twice(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    previous = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        fit([Do(2, twice), Checkpoint(every_n_steps=1)], steps=4)
    signal.signal(signal.SIGINT, previous)  # Lightning ignores it from then on
    assert names(tmp_path) == ["step-1.ckpt"]


def test_weights_that_are_not_finite_are_not_saved(fit, tmp_path):
    def spoil(trainer, module):
        with torch.no_grad():
            module.network.conv_out.bias[1] = float("nan")

    with pytest.raises(NonFiniteWeightsError, match=r"network\.conv_out\.bias.*step-2\.ckpt is the last good"):
        fit([Do(3, spoil), Checkpoint(every_n_steps=1)], steps=4)
    assert names(tmp_path) == ["step-1.ckpt", "step-2.ckpt"]


def test_find_last_passes_over_broken_ones(tmp_path, caplog):
    assert find_last(tmp_path) is None
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (9, 10):
        torch.save({"step": step}, folder / f"step-{step}.ckpt")
    (folder / "step-11.ckpt.partial").write_bytes(b"half")
    assert find_last(tmp_path).name == "step-10.ckpt"
    whole = (folder / "step-10.ckpt").read_bytes()
    (folder / "step-10.ckpt").write_bytes(whole[: len(whole) // 2])
    with zipfile.ZipFile(folder / "step-12.ckpt", "w") as archive:
        archive.writestr("other", "no checkpoint")
    assert find_last(tmp_path).name == "step-9.ckpt"
    assert "step-10.ckpt is broken" in caplog.text
    (folder / "step-9.ckpt").rename(folder / "last.ckpt")
    assert find_last(tmp_path).name == "last.ckpt"


def test_metrics_of_steps_behind_the_checkpoint_are_kept_once(fit, tmp_path):
    def run(steps, **more):
        logger = RunCSVLogger(str(tmp_path))
        fit([Checkpoint(every_n_steps=2)], steps, logger=logger, log_every_n_steps=1, **more)
        return (tmp_path / "metrics.csv").read_text().splitlines()

    run(5)
    (tmp_path / "checkpoints/step-5.ckpt").unlink()
    first = run(5, resume=tmp_path / "checkpoints/step-4.ckpt")
    assert [line.split(",")[0] for line in first] == ["step", "0", "1", "2", "3", "4"]
    assert run(6, resume=tmp_path / "checkpoints/step-5.ckpt")[:6] == first


def test_refuses_numbers_below_one():
    with pytest.raises(InputError, match="keep 0"):
        Checkpoint(keep=0)
