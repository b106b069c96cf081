"""Samples of fixed captions and seeds: the right weights, the right files, and training as if nothing were drawn."""

import json
import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image

from imagen_lightning.callbacks import EMA, RunCSVLogger, SampleGrid, averaged_weights, wandb_logger
from imagen_lightning.diffusion.random import seeded_generator
from imagen_lightning.images import downsample, from_pil, placeholder, to_float, to_uint8
from imagen_lightning.metrics.probes import colour_shift
from imagen_lightning.samplers import DDIM
from imagen_lightning.types import InputError

PROMPTS = ["a small red star on a white background", "a large blue ring on a black background", "nothing"]


def read(folder, step, name):
    return from_pil(Image.open(folder / f"samples/{step:07d}/{name}"))


class Careless(DDIM):
    """Draws from the global generators."""

    def __call__(self, *args, **kwargs):
        self.drawn = random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        return super().__call__(*args, **kwargs)


class Broken(DDIM):
    """Gives the second image of all as NaN."""

    def __call__(self, denoise, x, *args, **kwargs):
        images = super().__call__(denoise, x, *args, **kwargs)
        images[1 % len(images) :][:1] = torch.nan
        return images


class Draw(Callback):
    """What the stage draws after step 2, from the average."""

    def __init__(self, **more):
        self.more = more

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 2:
            number = 1 if self.more else 0
            generators = [seeded_generator(5, i, stage=number) for i in range(len(PROMPTS))]
            with averaged_weights(trainer, pl_module):
                images = pl_module.sample(PROMPTS, generators, num_steps=3, guidance=2.0, **self.more)
            self.images = to_uint8(images)


def test_draws_what_the_averaged_stage_draws(fit, tmp_path):
    draw = Draw()
    grid = SampleGrid(PROMPTS, every_n_steps=2, seed=5, num_steps=3, guidance=2.0, at_end=False, batch_size=2)
    fit([draw, grid, EMA()], steps=3)
    assert [folder.name for folder in (tmp_path / "samples").iterdir()] == ["0000002"]
    for i in range(3):
        difference = (read(tmp_path, 2, f"{i:05d}.png").int() - draw.images[i].int()).abs()
        assert difference.max() <= 1
    assert (draw.images[0].int() - draw.images[1].int()).abs().max() > 20
    picture = read(tmp_path, 2, "grid.png")
    assert picture.shape[-1] == 2 * (96 + 4) + 4
    saved = json.loads((tmp_path / "samples/0000002/samples.json").read_text())
    assert [image["caption"] for image in saved["images"]] == PROMPTS
    assert saved["sampler"] == {"class_path": "imagen_lightning.samplers.DDIM", "init_args": {"eta": 0.0}}
    expected = {"step": 2, "weights": "ema", "seed": 5, "num_steps": 3, "guidance": 2.0, "stage": 0, "aug_level": None}
    assert {key: saved[key] for key in expected} == expected


def test_the_grid_reaches_wandb(fit, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = wandb_logger(tmp_path, "project", {})
    fit([SampleGrid(PROMPTS, every_n_steps=2, num_steps=2, at_end=False)], steps=3, logger=logger)
    logger.experiment.finish()
    (sent,) = tmp_path.glob("wandb/offline-run-*/files/media/images/samples_*.png")
    assert torch.equal(from_pil(Image.open(sent)), read(tmp_path, 2, "grid.png"))


@pytest.mark.parametrize("kind", ["base", "sr"])
def test_training_is_the_same_to_the_bit(fit, make_base, make_sr, kind):
    def run(callbacks):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        stage = make_base(dropout=0.5) if kind == "base" else make_sr()
        stage.sampling.sampler = Careless()
        settings = {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None}
        fit([EMA(), *callbacks], stage=stage, **settings)
        assert stage.training
        return stage.state_dict(), (random.random(), np.random.rand(), torch.rand(1).item())  # noqa: NPY002

    (without, drawn), (with_it, drawn_with_it) = run([]), run([SampleGrid(PROMPTS, every_n_steps=1)])
    assert all(torch.equal(without[name], with_it[name]) for name in without)
    assert drawn == drawn_with_it


@pytest.mark.parametrize("prompts", [[], PROMPTS])
def test_super_resolution_enlarges_validation_images(fit, make_sr, make_data, read_rows, tmp_path, prompts):
    data = make_data()
    truth = torch.cat([batch.images for batch in data.val_dataloader()])
    draw = Draw(low_res=downsample(to_float(truth[:3]), 4))
    grid = SampleGrid(prompts, num_images=5, every_n_steps=2, seed=5, num_steps=3, guidance=2.0, at_end=False)
    fit([EMA(), draw, grid], steps=2, stage=make_sr(), datamodule=data, logger=RunCSVLogger(str(tmp_path)))
    saved = json.loads((tmp_path / "samples/0000002/samples.json").read_text())
    captions = [caption for batch in data.val_dataloader() for caption in batch.captions]
    assert [image["caption"] for image in saved["images"]] == (prompts or captions[:5])
    assert (saved["stage"], saved["aug_level"]) == (1, 0.1)
    if prompts:
        assert (read(tmp_path, 2, "00001.png").int() - draw.images[1].int()).abs().max() <= 1
    picture = read(tmp_path, 2, "grid.png")
    columns = len(saved["images"])
    images = torch.stack([read(tmp_path, 2, f"{i:05d}.png") for i in range(columns)])
    shifts = colour_shift(images, to_uint8(downsample(to_float(truth[:columns]), 4)))
    assert saved["colour_shifts"] == pytest.approx(shifts.tolist())
    assert read_rows(tmp_path) == {2: {"sr_8/samples_colour_shift": pytest.approx(float(shifts.mean()))}}
    assert picture.shape[-1] == columns * 100 + 4
    height = 96 + 4  # only the last row has captions, under it
    for row, image in enumerate([to_uint8(downsample(to_float(truth[:2]), 4))[1], None, truth[1]]):
        image = read(tmp_path, 2, "00001.png") if image is None else image
        side = 96 // image.shape[-1]
        enlarged = image.repeat_interleave(side, -1).repeat_interleave(side, -2)
        top = 4 + row * height
        assert torch.equal(picture[:, top : top + 96, 104:200], enlarged)


def test_a_last_grid_with_the_average(fit, tmp_path):
    stage, _ = fit([SampleGrid(PROMPTS, every_n_steps=100), EMA()], steps=3)
    assert [folder.name for folder in (tmp_path / "samples").iterdir()] == ["0000003"]
    images = to_uint8(stage.sample(PROMPTS, [seeded_generator(0, i, stage=0) for i in range(3)]))
    assert (read(tmp_path, 3, "00002.png").int() - images[2].int()).abs().max() <= 1
    fit([SampleGrid(PROMPTS, every_n_steps=2)], steps=2)
    assert sorted(folder.name for folder in (tmp_path / "samples").iterdir()) == ["0000002", "0000003"]


def test_refusals(fit):
    with pytest.raises(InputError, match="no prompts"):
        fit([SampleGrid()])
    with pytest.raises(InputError, match="num_images 0"):
        SampleGrid(num_images=0)


def test_more_prompts_than_validation_images_are_refused(fit, make_sr, make_data):
    with pytest.raises(InputError, match="3 prompts for 2 validation images"):
        fit([SampleGrid(PROMPTS)], stage=make_sr(), datamodule=make_data(num_val=2))


def test_images_that_are_not_finite_are_marked_and_training_continues(fit, make_sr, tmp_path, recwarn):
    grid = SampleGrid(PROMPTS, every_n_steps=1, num_steps=2, sampler=Broken(), batch_size=3)
    _, trainer = fit([grid], steps=3)
    assert trainer.global_step == 3
    for step in (1, 2, 3):
        assert torch.equal(read(tmp_path, step, "00001.png"), placeholder(8, 8))
        assert not torch.equal(read(tmp_path, step, "00000.png"), placeholder(8, 8))
        assert json.loads((tmp_path / f"samples/{step:07d}/samples.json").read_text())["not_finite"] == ["00001.png"]
    said = [str(each.message) for each in recwarn if "checkerboard" in str(each.message)]
    assert len(said) == 1
    assert "stage 'base' gave NaN or infinite values at step 2 of 2, in 1 of 3 images" in said[0]


def test_the_colour_shift_of_an_image_that_is_not_finite_is_not_logged(fit, make_sr, tmp_path):
    grid = SampleGrid(num_images=2, every_n_steps=1, num_steps=2, sampler=Broken())
    fit([grid], steps=1, stage=make_sr(), logger=RunCSVLogger(str(tmp_path)))
    saved = json.loads((tmp_path / "samples/0000001/samples.json").read_text())
    assert saved["colour_shifts"][1] == "nan"
    assert saved["not_finite"] == ["00001.png"]
    assert "colour_shift" not in (tmp_path / "metrics.csv").read_text()
