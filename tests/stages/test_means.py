"""`train/loss` is the mean over the steps since it was last logged, whatever is accumulated, stopped or dealt out."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from tiny_stages import base_stage, sr_stage

from imagen_lightning.callbacks import Checkpoint, NoiseLevelLoss, RunCSVLogger
from imagen_lightning.data import ShapesDataModule
from imagen_lightning.stages.means import Means

EVERY = 3


class Losses(Callback):
    """Of each micro-batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(float(pl_module.record.losses.mean()))


def fit(folder, make=base_stage, steps=8, resume=None, callbacks=(), data=None, **settings):
    stage = make()
    stage.__dict__.pop("log", None)
    losses = Losses()
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": steps,
            "logger": RunCSVLogger(str(folder)),
            "log_every_n_steps": EVERY,
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "default_root_dir": folder,
            "callbacks": [losses, *callbacks],
            **settings,
        }
    )
    data = data or ShapesDataModule(image_size=8, batch_size=4, num_val=3)
    trainer.fit(stage, datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer, losses.seen


def rows_of(folder):
    with Path(folder, "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def logged(folder, name="train/loss"):
    return {int(row["step"]): float(row[name]) for row in rows_of(folder) if row.get(name)}


@pytest.mark.parametrize(("make", "accumulate"), [(base_stage, 1), (base_stage, 2), (sr_stage, 3)])
def test_a_row_is_the_mean_of_all_micro_batches_since_the_last(tmp_path, make, accumulate):
    _, seen = fit(tmp_path, make, accumulate_grad_batches=accumulate)
    assert len(seen) == 8 * accumulate
    part = EVERY * accumulate
    wanted = {2: sum(seen[:part]) / part, 5: sum(seen[part : 2 * part]) / part}
    assert logged(tmp_path) == pytest.approx(wanted, rel=1e-6)


def test_a_row_a_step_is_the_loss_itself(tmp_path):
    trainer, seen = fit(tmp_path, log_every_n_steps=1, steps=3)
    assert list(logged(tmp_path).values()) == seen
    assert float(trainer.callback_metrics["train/loss"]) == seen[-1]


def test_a_run_resumed_between_two_rows_logs_the_same(tmp_path):
    def checkpoint():
        return [Checkpoint(every_n_steps=4), NoiseLevelLoss(3, EVERY)]

    fit(tmp_path / "whole", callbacks=checkpoint(), accumulate_grad_batches=2)
    fit(tmp_path / "parts", callbacks=checkpoint(), accumulate_grad_batches=2, steps=4)
    last = tmp_path / "parts/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["mean_loss"][0, 1].item() == 2 * 4  # a step of two micro-batches of 4
    fit(tmp_path / "parts", callbacks=checkpoint(), accumulate_grad_batches=2, resume=last)
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
    assert 5 in logged(tmp_path / "whole")


def test_a_second_run_of_a_stage_begins_at_nothing(tmp_path):
    stage = base_stage()
    for name in ("first", "second"):
        _, seen = fit(tmp_path / name, lambda: stage, steps=EVERY - 1 if name == "first" else EVERY)
    assert logged(tmp_path / "second") == pytest.approx({2: sum(seen) / EVERY}, rel=1e-6)


class Strategy:
    """Of this process and another one."""

    root_device = torch.device("cpu")
    other = torch.tensor([[6.0, 1.0], [2.0, 1.0]], dtype=torch.float64)

    def reduce(self, own, reduce_op):
        assert reduce_op == "sum"
        return own + self.other

    def all_gather(self, own):
        return torch.stack([own, self.other])


def test_processes_add_sums_and_counts_and_continue_their_own():
    means = Means(2)
    means.add(torch.tensor([1.0, 2.0]), torch.tensor([0, 0]))
    parts = means.parts(Strategy())
    assert means.take(Strategy(), torch.device("cpu")).tolist() == [[9, 1], [4, 1]]
    assert means.take(Strategy(), torch.device("cpu")).tolist() == Strategy.other.tolist()
    for rank in (0, 1):
        means.restore(parts, rank, 2)
        assert torch.equal(means.totals, parts[rank])
    means.restore(parts, 0, 1)
    assert means.totals.tolist() == [[9, 1], [4, 1]]
    means.restore(parts, 1, 3)
    assert means.totals is None
    Means(3).restore(parts, 0, 1)  # of other bins: left out


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import imagen_lightning.torchvision_mend
from test_means import *

for accumulate in (1, 2):
    data = ShapesDataModule(image_size=8, batch_size=4, num_val=5)
    fit({run!r} + str(accumulate), data=data, accumulate_grad_batches=accumulate, devices=2, strategy="ddp",
        limit_val_batches=1.0, val_check_interval=6, check_val_every_n_epoch=None,
        callbacks=[NoiseLevelLoss(2, EVERY)])
"""


def test_two_processes_log_the_mean_over_both(tmp_path):
    """The global batch is the same, and so are its mean and that of five validation images, dealt out 3 and 2."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), run=str(tmp_path / "two")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    for accumulate in (1, 2):
        validation = {"limit_val_batches": 1.0, "val_check_interval": 6, "check_val_every_n_epoch": None}
        data = ShapesDataModule(image_size=8, batch_size=4, num_val=5)
        own = tmp_path / f"one{accumulate}"
        fit(own, data=data, accumulate_grad_batches=accumulate, callbacks=[NoiseLevelLoss(2, EVERY)], **validation)
        one, two = (rows_of(folder) for folder in (own, tmp_path / f"two{accumulate}"))
        assert [row.keys() for row in one] == [row.keys() for row in two]
        numbers = [{key: float(value) for row in rows for key, value in row.items() if value} for rows in (one, two)]
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-4)
        assert {"train/loss", "val/loss"} <= numbers[0].keys()
