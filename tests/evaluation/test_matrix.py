"""The matrix names the stage in which a fault was planted, and holds what it should."""

import warnings

import pytest
import torch
from lightning.pytorch import Trainer

from imagen_lightning.cascade import Cascade
from imagen_lightning.data.datamodule import ShapesDataModule
from imagen_lightning.data.shapes import draw, parse_caption
from imagen_lightning.diffusion import X0, LowResAugmentation, ShiftedCosineSchedule
from imagen_lightning.evaluation.data import load_evaluation_set
from imagen_lightning.evaluation.drawing import Drawing
from imagen_lightning.evaluation.matrix import run_matrix
from imagen_lightning.evaluation.measures import CAPTION_ACCURACY, Measurer
from imagen_lightning.images import downsample, to_float
from imagen_lightning.metrics.features import RandomConvFeatures
from imagen_lightning.networks import EfficientUNet, UNet
from imagen_lightning.stages import BaseStage, Diffusion, Optimization, Sampling, SuperResolutionStage, TextSettings
from imagen_lightning.text import TinyTextEncoder

NUM = 40


def trained(stage, image_size, steps, batch_size=8):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(stage, datamodule=ShapesDataModule(image_size, batch_size))
    return stage.eval()


def base_stage(cls=BaseStage):
    network = UNet(dim=8, multipliers=[1, 2], num_blocks=1, attention=[False, True], text_dim=16, head_dim=8, groups=4)
    sampling = Sampling(num_steps=4, guidance=1.0)
    return cls(32, network, text=TextSettings(TinyTextEncoder(dim=16, max_tokens=64)), sampling=sampling)


def sr_stage(cls=SuperResolutionStage):
    network = EfficientUNet(
        dim=16, multipliers=[1], num_blocks=1, attention=["none"], patch_size=2, groups=4, text_dim=None
    )
    return cls(
        64, 32, network,
        diffusion=Diffusion(schedule=ShiftedCosineSchedule(64, 32), parametrization=X0()),
        augmentation=LowResAugmentation(max_level=0.5),
        aug_level=0.05,
        sampling=Sampling(num_steps=1, guidance=1.0),
        optimization=Optimization(
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=5e-3), warmup_steps=20, lr_schedule="cosine"
        ),
    )  # fmt: skip


class Answers(BaseStage):
    """A base stage without fault: it draws each caption's scene."""

    def sample(self, captions, generators, **settings):
        import numpy as np

        scenes = [draw(parse_caption(caption), np.random.default_rng(0)) for caption in captions]
        images = torch.stack([torch.from_numpy(scene.transpose(2, 0, 1).copy()) for scene in scenes])
        return downsample(to_float(images), self.image_size)


class Shuffled(SuperResolutionStage):
    """A super-resolution stage that is given another image's low resolution."""

    def sample(self, captions, generators, *, low_res, **settings):
        return super().sample(captions, generators, low_res=low_res.roll(1, 0), **settings)


@pytest.fixture(scope="module")
def good():
    torch.manual_seed(0)
    return Cascade([base_stage(Answers), trained(sr_stage(), 64, 400)])


def matrix(cascade, folder, **settings):
    data = load_evaluation_set("shapes", NUM, 64)
    drawing = Drawing(cascade, data, folder / "samples", identity="x", batch_size=20)
    return run_matrix(drawing, cascade.settings(**settings), Measurer(folder / "measured", [RandomConvFeatures()]))


def accuracy(found):
    return {
        (row.stage, row.input): value["value"]
        for row in found.rows
        for value in row.values
        if value["metric"] == CAPTION_ACCURACY
    }


def test_a_cascade_without_fault_names_no_stage(good, tmp_path):
    found = matrix(good, tmp_path)
    numbers = accuracy(found)
    assert numbers["sr_64", "chain"] >= 0.9
    assert numbers["sr_64", "real"] >= 0.9
    assert found.verdict.startswith("no stage stands out")
    assert [(row.stage, row.input) for row in found.rows] == [
        ("base", None),
        ("sr_64", "chain"),
        ("sr_64", "real"),
        ("real images, 32 px", None),
        ("real images, 64 px", None),
    ]
    metrics = {(row.stage, row.input): [value["metric"] for value in row.values] for row in found.rows}
    assert {"PSNR", "SSIM", "low-res PSNR", "colour shift", "FD-random"} <= set(metrics["sr_64", "real"])
    assert "PSNR" not in metrics["sr_64", "chain"]  # no truth belongs to generated images
    assert all(row.seconds_per_image > 0 and row.peak_memory_bytes > 0 for row in found.rows[:3])


def test_a_base_of_50_steps_is_named(good, tmp_path):
    torch.manual_seed(0)
    found = matrix(Cascade([trained(base_stage(), 32, 50), good.stages[1]]), tmp_path)
    assert found.verdict.startswith("base costs the most")
    assert found.judgements[0].costs[1].value < 0.2 * found.judgements[0].costs[0].value


def test_a_super_resolution_stage_fed_shuffled_images_is_named(good, tmp_path):
    shuffled = sr_stage(Shuffled)
    shuffled.load_state_dict(good.stages[1].state_dict())
    found = matrix(Cascade([good.stages[0], shuffled]), tmp_path)
    assert found.verdict.startswith("sr_64 costs the most")
    assert found.judgements[0].costs[0].value < 0.2 * found.judgements[0].costs[1].value


def test_a_wrong_aug_level_is_named(good, tmp_path):
    found = matrix(good, tmp_path, aug_level=0.5)
    assert found.verdict.startswith("sr_64 costs the most")


def test_three_stages_are_each_measured_on_all_inputs_and_their_costs_add_up(tmp_path):
    torch.manual_seed(0)
    middle = trained(SuperResolutionStage(
        32, 16,
        EfficientUNet(dim=8, multipliers=[1], num_blocks=1, attention=["none"], groups=4, text_dim=None),
        aug_level=0.0, sampling=Sampling(num_steps=1, guidance=1.0),
    ), 32, 2)  # fmt: skip
    first = Answers(16, base_stage().network, text=TextSettings(TinyTextEncoder(dim=16, max_tokens=64)))
    found = matrix(Cascade([first, middle, sr_stage().eval()]), tmp_path)
    assert [(row.stage, row.input) for row in found.rows] == [
        ("base", None),
        ("sr_32", "generated"),
        ("sr_64", "chain"),
        ("sr_32", "real"),
        ("sr_64", "generated"),
        ("sr_64", "real"),
        *((f"real images, {size} px", None) for size in (16, 32, 64)),
    ]
    numbers = accuracy(found)
    costs = found.judgements[0].costs
    lost = numbers["real images, 64 px", None] - numbers["sr_64", "chain"]
    assert [cost.stage for cost in costs] == ["base", "sr_32", "sr_64"]
    assert sum(cost.value for cost in costs) == pytest.approx(lost, abs=1e-12)
    chains_seconds = {(row.stage, row.input): row.seconds_per_image for row in found.rows}
    assert chains_seconds["sr_64", "chain"] > chains_seconds["sr_32", "generated"] > chains_seconds["base", None]


def test_what_was_measured_is_read_again(good, tmp_path):
    first = matrix(good, tmp_path)
    paths = sorted((tmp_path / "measured").glob("*.json"))
    assert len(paths) == 5  # three chains, and the real images at two sizes
    before = [path.stat().st_mtime_ns for path in paths]
    again = matrix(good, tmp_path)
    assert [path.stat().st_mtime_ns for path in paths] == before
    assert again.rows == first.rows
