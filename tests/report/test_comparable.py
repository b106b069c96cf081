"""Values of different protocols never stand in one column."""

import numpy as np
import pytest

from imagen_lightning.metrics.protocol import Protocol, Value
from imagen_lightning.report.comparable import (
    OF_THE_MODEL,
    distinct,
    last_values,
    measurements,
    value_columns,
    yardstick,
)
from imagen_lightning.report.runs import Curve, Measurement, Run


def run(config, name="a", **curves):
    return Run(
        folder=name, name=name, config=config, curves={key: Curve(np.arange(len(c)), c) for key, c in curves.items()}
    )


def key(config):
    return yardstick(run(config)).key


def test_what_makes_losses_comparable(make):
    plain = make.configuration()
    assert key(plain) == key(make.configuration(lr=1e-5, seed=3))
    reseeded = {**plain["data"], "init_args": {**plain["data"]["init_args"], "seed": 3}}
    assert key(plain) == key(plain | {"data": reseeded})  # validation data do not depend on it
    for other in (
        make.configuration(image_size=32),
        make.configuration(low_res_size=8),
        make.configuration(diffusion={"parametrization": {"class_path": "imagen_lightning.diffusion.Velocity"}}),
        plain | {"ema": {"decay": 0}},
        plain | {"trainer": {"precision": "32-true"}},
        plain | {"data": {"class_path": "imagen_lightning.data.ShapesDataModule", "init_args": {"num_val": 1}}},
    ):
        assert key(other) != key(plain)


def test_training_data_part_training_losses_alone(make):
    def of(train):
        config = make.configuration()
        config["data"] = {
            "class_path": "imagen_lightning.data.LaionDataModule",
            "init_args": {"train": train, "val": "v"},
        }
        return yardstick(run(config))

    first, second = of("a.tar"), of("b.tar")
    assert first.protocol("val/loss") == second.protocol("val/loss")
    assert first.protocol("train/loss") != second.protocol("train/loss")


def test_runs_without_configuration_stand_alone():
    assert yardstick(run({}, "a")).key != yardstick(run({}, "b")).key
    assert yardstick(run({"model": 3, "data": "x"}, "a")).label == "a, configuration unknown"


def test_labels_say_what_differs(make):
    plain, other = make.configuration(), make.configuration()
    other["data"]["init_args"]["num_val"] = 64
    labels = [item.label for item in distinct([yardstick(run(config)) for config in (plain, other, plain)])]
    assert labels == ["base 16 px, X0, data.num_val 256", "base 16 px, X0, data.num_val 64", labels[0]]
    assert distinct([yardstick(run(plain))])[0].label == "base 16 px, X0"


def test_last_values(make):
    losses = np.random.default_rng(0).normal(1, 0.1, 50)
    found = run(make.configuration(), **{"train/loss": losses, "val/loss": losses[:3], "base/FID": losses[:5]})
    found.curves["throughput/images_per_second"] = found.curves["epoch"] = found.curves["val/loss"]
    found.curves["val/loss_t/0.00-0.10"] = found.curves["data/skipped/no_image"] = found.curves["val/loss"]
    train, val, fid = last_values(found, yardstick(found))
    assert (train.metric, val.metric, fid.metric) == ("train/loss", "val/loss", "base/FID")
    assert train.value == pytest.approx(losses[-20:].mean())
    error = losses[-20:].std(ddof=1) / 20**0.5
    assert (train.low, train.high) == (pytest.approx(train.value - error), pytest.approx(train.value + error))
    assert (val.value, val.low) == (losses[2], None)
    assert fid.value == losses[4]


@pytest.mark.parametrize("count", [2, 17, 20, 50])
def test_a_mean_says_how_many_values_it_covers(make, count):
    losses = np.arange(count, dtype=float)
    found = run(make.configuration(), **{"train/loss": losses})
    (train,) = last_values(found, yardstick(found))
    covered = min(count, 20)
    assert train.value == losses[-covered:].mean()
    assert train.confidence == f"1 standard error of the mean of {covered}"
    assert train.protocol.settings == "mean of the last logged values, at most 20"


def test_metrics_with_protocols_of_their_own(make):
    found = run(make.configuration(), **{"base/fid": np.array([4.0, 3.0]), "base/text_z": np.array([2.0])})
    first, last = (Value("FID", x, x - 1, x + 1, Protocol("FID", num_samples=9), "95%") for x in (4.0, 3.0))
    found.measurements = [Measurement(1, "base/fid", first), Measurement(2, "base/fid", last)]
    probe, fid = last_values(found, yardstick(found))
    assert fid == last
    assert (probe.metric, probe.value, probe.low) == ("base/text_z", 2.0, None)
    over_time = measurements(found, yardstick(found))
    assert [(item.step, item.value.metric) for item in over_time] == [(1, "FID"), (2, "FID"), (0, "base/text_z")]


def value(metric, number, **protocol):
    return Value(metric, number, None, None, Protocol(metric, **protocol))


def test_columns_part_protocols_and_keep_metrics_together():
    rows = [
        [value("FID", 1, num_samples=200), value("PSNR", 20)],
        [value("FID", 2, num_samples=1000, guidance=2), value("PSNR", 21)],
        [value("FID", 3, num_samples=200)],
        [],
    ]
    found = value_columns(rows)
    numbers = [(c.letter, c.first.metric, {row: v.value for row, v in c.values.items()}) for c in found]
    assert numbers == [("a", "FID", {0: 1, 2: 3}), ("b", "FID", {1: 2}), ("c", "PSNR", {0: 20, 1: 21})]
    shared = [[value("FID", 1, num_samples=9), value("FID, part", 2, num_samples=9), value("KID", 3, num_samples=9)]]
    assert [(c.letter, c.first.metric) for c in value_columns(shared)] == [
        ("a", "FID"),
        ("a", "KID"),
        ("a", "FID, part"),
    ]
    sweep = [[value("FID", guidance, guidance=guidance)] for guidance in range(30)]
    assert len(value_columns(sweep)) == 30
    assert [len(c.values) for c in value_columns(sweep, ["guidance"])] == [30]
    assert [c.letter for c in value_columns(sweep)][25:28] == ["z", "aa", "ab"]


def test_runs_of_other_models_share_a_column_and_other_samplings_do_not():
    sampled = {"sampler": "DDIM(eta=0)", "sampling": {"spacing": "UniformTimes"}}
    runs = [
        sampled | {"process": {"diffusion.parametrization": "X0"}},
        sampled | {"process": {"diffusion.parametrization": "V"}},
        sampled | {"sampler": "DDIM(eta=1)"},
        sampled | {"sampling": {"spacing": "LogSNRTimes(low=-9, high=9)"}},
    ]
    found = value_columns([[value("FID", 1, **made)] for made in runs], OF_THE_MODEL)
    assert [list(column.values) for column in found] == [[0, 1], [2], [3]]
