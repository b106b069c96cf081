"""Means by level against a plain loop over what the steps recorded."""

import csv
from collections import defaultdict

import pytest
from lightning.pytorch import Callback

from imagen_lightning.callbacks import NoiseLevelLoss, RunCSVLogger
from imagen_lightning.types import InputError


class Records(Callback):
    def __init__(self):
        self.train, self.val = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.train.append(pl_module.record)

    def on_validation_batch_end(self, trainer, pl_module, *_):
        if not trainer.sanity_checking:
            self.val.append(pl_module.record)


def expected(records, levels, prefix, num_bins):
    bins = defaultdict(list)
    for record in records:
        for level, loss in zip(getattr(record, levels).tolist(), record.losses.tolist()):
            bins[int(level * num_bins)].append(loss)
    return {f"{prefix}/{i / num_bins:.2f}-{(i + 1) / num_bins:.2f}": sum(b) / len(b) for i, b in bins.items()}


def rows_of(folder):
    with (folder / "metrics.csv").open() as file:
        return {int(row.pop("step")): {k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)}


@pytest.mark.parametrize("kind", ["base", "sr"])
def test_means_by_bin_at_the_right_steps(fit, make_base, make_sr, tmp_path, kind):
    records = Records()
    settings = {"limit_val_batches": 1.0, "val_check_interval": 3, "check_val_every_n_epoch": None}
    fit(
        [NoiseLevelLoss(num_bins=5, every_n_steps=2), records],
        stage=make_base() if kind == "base" else make_sr(),
        logger=RunCSVLogger(str(tmp_path)),
        log_every_n_steps=1,
        **settings,
    )
    rows = rows_of(tmp_path)
    assert len(records.val) == 2
    for step, prefix, seen in (
        (1, "train", records.train[:2]),
        (3, "train", records.train[2:]),
        (2, "val", records.val),
    ):
        wanted = expected(seen, "times", f"{prefix}/loss_t", 5)
        if kind == "sr":
            wanted |= expected(seen, "aug_level", f"{prefix}/loss_aug", 5)
        found = {k: v for k, v in rows[step].items() if k.startswith((f"{prefix}/loss_t", f"{prefix}/loss_aug"))}
        assert found == pytest.approx(wanted, rel=1e-5)
    assert rows[2]["val/loss"] == pytest.approx(sum(r.losses.sum().item() for r in records.val) / 6, rel=1e-5)
    assert not any(key.startswith("train/loss_t") for key in rows[0])


def test_refuses_no_bins():
    with pytest.raises(InputError, match="num_bins 0"):
        NoiseLevelLoss(num_bins=0)
