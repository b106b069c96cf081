"""When callbacks look: by steps, by epochs of the data, at the end, once whatever was cut off."""

import math
import signal

import pytest
from lightning.pytorch import Callback

from imagen_lightning.callbacks import Checkpoint
from imagen_lightning.callbacks.schedule import Schedule
from imagen_lightning.data.datamodule import LaionDataModule
from imagen_lightning.types import InputError


class Looks(Callback):
    def __init__(self, *settings, **named):
        self.schedule = Schedule(*settings, **named)
        self.steps = []

    def on_train_start(self, trainer, pl_module):
        self.schedule.start(trainer, "Looks")

    def on_train_batch_end(self, trainer, *_):
        if self.schedule.is_due(trainer):
            self.steps.append(trainer.global_step)

    def on_train_end(self, trainer, pl_module):
        if self.schedule.is_due_at_end(trainer):
            self.steps.append(trainer.global_step)


class Interrupt(Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 2:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(("num_steps", "wanted"), [(5, [2, 4, 5]), (4, [2, 4]), (1, [1])])
def test_every_n_steps_and_once_at_the_end(fit, num_steps, wanted):
    looks, without_end = Looks(2), Looks(2, at_end=False)
    fit([looks, without_end], steps=num_steps)
    assert looks.steps == wanted
    assert without_end.steps == [step for step in wanted if step % 2 == 0]


def test_accumulated_batches_are_no_steps(fit):
    looks = Looks(2, at_end=False)
    fit([looks], steps=5, accumulate_grad_batches=3)
    assert looks.steps == [2, 4]


def test_a_resumed_run_looks_where_the_uninterrupted_one_does(fit, tmp_path):
    fit([Checkpoint(every_n_steps=3)], steps=3)
    looks = Looks(2)
    fit([looks, Checkpoint(every_n_steps=3)], steps=7, resume=tmp_path / "checkpoints/step-3.ckpt")
    assert looks.steps == [4, 6, 7]


def test_a_run_that_was_killed_before_its_end_makes_up_for_it(fit, tmp_path):
    fit([Checkpoint()], steps=3)
    looks = Looks(2)
    fit([looks, Checkpoint()], steps=3, resume=tmp_path / "checkpoints/step-3.ckpt")
    assert looks.steps == [3]


def test_a_signal_ends_a_run_without_a_last_look(fit):
    looks = Looks(10)
    fit([looks, Interrupt(), Checkpoint()], steps=6)
    assert looks.steps == []


@pytest.mark.parametrize(("epochs", "accumulate"), [(1, 1), (0.5, 1), (2, 1), (1, 2)])
def test_epochs_are_passes_over_the_shards(fit, make_shards, tmp_path, epochs, accumulate):
    shard = make_shards(tmp_path / "train.tar", range(10))
    looks = Looks(1000, epochs, at_end=False)
    data = LaionDataModule(shard, image_size=8, batch_size=4)
    fit([looks], steps=11, datamodule=data, folder=tmp_path / "run", accumulate_grad_batches=accumulate)
    period = 10 * epochs  # samples: a step is due that completes one more
    passes = [math.floor(4 * accumulate * step / period) for step in range(12)]
    assert looks.steps == [step for step in range(1, 12) if passes[step] > passes[step - 1]]
    assert looks.steps


def test_endless_data_has_no_epochs(fit):
    with pytest.raises(InputError, match="Looks cannot count epochs of data that never end; give every_n_steps"):
        fit([Looks(5, 1.0)])


def test_a_development_run_is_not_looked_at(fit, tmp_path):
    looks = Looks(1)
    fit([looks], fast_dev_run=2, folder=tmp_path)
    assert looks.steps == []


@pytest.mark.parametrize("settings", [(0,), (5, 0.0), (5, -1.0), (5, math.inf)])
def test_refusals(settings):
    with pytest.raises(InputError, match=r"every_n_steps .* must be at least 1"):
        Schedule(*settings)
