"""What W&B is told of a cascade's stages, read back from their offline runs."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from offline_wandb import read
from PIL import Image

from imagen_lightning.callbacks.loggers import cascade_name, wandb_logger
from imagen_lightning.cli.main import main
from imagen_lightning.images import from_pil

PROMPTS = ["a small red star on a white background", "a large blue ring on a black background"]
TEXT = {"encoder": {"class_path": "imagen_lightning.text.TinyTextEncoder", "init_args": {"dim": 8}}}
COMMON = {
    "text": TEXT,
    "sampling": {"num_steps": 2},
    "optimization": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}},
}
SIZES = {"dim": 8, "multipliers": [1], "num_blocks": 1, "text_dim": 8, "groups": 4, "head_dim": 8}


def component(name, **arguments):
    return {"class_path": f"imagen_lightning.{name}", "init_args": arguments}


STAGES = {
    "base": component(
        "stages.BaseStage", image_size=4, network=component("networks.UNet", **SIZES, attention=[True]), **COMMON
    ),
    "sr": component(
        "stages.SuperResolutionStage",
        image_size=8,
        low_res_size=4,
        network=component("networks.EfficientUNet", **SIZES, attention=["self"]),
        **COMMON,
    ),
}


def write(kind):
    shared = {"num_samples": 6, "every_n_steps": 2, "num_steps": 2}
    grid = {"prompts": PROMPTS} if kind == "base" else {"num_images": 3}
    config = {
        "model": STAGES[kind],
        "data": component("data.ShapesDataModule", image_size=4 if kind == "base" else 8, batch_size=4, num_val=20),
        "trainer": {
            **{"accelerator": "cpu", "max_steps": 3, "val_check_interval": 3, "log_every_n_steps": 1},
            "callbacks": [
                component("callbacks.SampleGrid", **grid, every_n_steps=2),
                component(
                    "callbacks.FID", **shared, extractor=component("metrics.features.RandomConvFeatures", seed=1)
                ),
                component("callbacks.KID", **shared, sampler=component("samplers.DDIM", eta=1.0)),
                component("callbacks.CaptionAccuracy", **shared),
                component("callbacks.Probes", num_samples=16, num_steps=2),
            ],
        },
        "throughput": {"measure_matmul": False},
    }
    Path(f"{kind}.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The two stages of a cascade, trained by `fit`, and what their offline runs hold."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "offline")
        patch.setattr(sys, "argv", ["imagen-lightning"])
        for kind in STAGES:
            write(kind)
            assert main(["fit", "--config", f"{kind}.yaml", "--run", f"runs/shop/{kind}"]) == 0
    return {kind: (folder / "runs/shop" / kind, read(folder / "runs/shop" / kind)) for kind in STAGES}


def test_stages_of_a_cascade_are_a_group_each_with_its_job_type(runs):
    told = {kind: (run.run.run_group, run.run.job_type, run.run.display_name) for kind, (_, run) in runs.items()}
    assert told == {"base": ("shop", "base", "base"), "sr": ("shop", "sr_8", "sr")}
    assert runs["sr"][1].config["model"]["init_args"]["low_res_size"] == 4


def test_every_metric_is_drawn_over_the_optimizer_steps(runs):
    for _, run in runs.values():
        assert set(run.definitions) == {"trainer/global_step", "*"}
        assert run.definitions["*"].step_metric == "trainer/global_step"
        assert run.definitions["*"].options.step_sync
        assert all("trainer/global_step" in row for row in run.history)


def test_metrics_stand_at_the_steps_of_metrics_csv(runs, read_rows):
    for kind, name in (("base", "base"), ("sr", "sr_8")):
        folder, run = runs[kind]
        rows = read_rows(folder)
        keys = {key for row in rows.values() for key in row}
        assert {f"{name}/{metric}" for metric in ("fd-random", "kd-random", "caption_accuracy", "text_gain")} <= keys
        for key in keys - {"epoch"}:
            assert dict(run.rows(key)) == {step: row[key] for step, row in rows.items() if key in row}, key
        assert [step for step, _ in run.rows(f"{name}/fd-random")] == [2, 3]
        assert [step for step, _ in run.rows("train/loss")] == [0, 1, 2]
        assert [step for step, _ in run.rows("samples._type")] == [2, 3]
    assert [step for step, _ in run.rows("sr_8/samples_colour_shift")] == [2, 3]


def same(path, image):
    return torch.equal(from_pil(Image.open(path)), from_pil(Image.open(image)))


def test_tables_hold_captions_and_images(runs):
    folder, run = runs["base"]
    columns, rows = run.tables["samples_table"]
    assert columns == ["caption", "image"]
    assert [row[0] for row in rows] == PROMPTS
    assert all(same(row[1], folder / f"samples/0000003/{i:05d}.png") for i, row in enumerate(rows))
    folder, run = runs["sr"]
    columns, rows = run.tables["samples_table"]
    assert columns == ["caption", "image", "low_res", "truth", "colour_shift"]
    assert len(rows) == 3
    for i, (_, image, low_res, truth, _) in enumerate(rows):
        assert same(image, folder / f"samples/0000003/{i:05d}.png")
        assert [Image.open(path).size for path in (low_res, truth)] == [(4, 4), (8, 8)]
        assert all(folder in path.parents for path in (image, low_res, truth))
    mean = sum(row[4] for row in rows) / 3
    assert run.rows("sr_8/samples_colour_shift")[-1] == (3, pytest.approx(mean))
    assert [step for step, _ in run.rows("samples_table.nrows")] == [2, 3]


def test_names_of_cascades(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cascade_name("runs/shop/base") == "shop"
    assert cascade_name(tmp_path / "shop" / "base") == "shop"
    assert cascade_name("runs/mine") is None
    assert cascade_name("mine") is None
    assert cascade_name("/mine") is None


def test_what_is_said_about_group_and_job_type_counts(tmp_path, monkeypatch):
    for name in ("WANDB_RUN_GROUP", "WANDB_JOB_TYPE"):
        monkeypatch.delenv(name, raising=False)

    def told(**settings):
        made = wandb_logger(tmp_path / "shop/base", "project", {}, **settings)._wandb_init
        return made["group"], made["job_type"]

    assert told() == ("shop", None)
    assert told(group="sweep", job_type="base") == ("sweep", "base")
    monkeypatch.setenv("WANDB_RUN_GROUP", "night")
    monkeypatch.setenv("WANDB_JOB_TYPE", "try")
    assert told(job_type="base") == ("night", "try")
    assert told(group="sweep") == ("sweep", "try")
