"""Training on images of other aspects than the square, from shards to both kinds of stages."""

import io
import math
import tarfile

import lightning
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_stages import TEXT_DIM, base_stage, generators, make_batch, sr_stage, watch

from imagen_lightning.data.datamodule import LaionDataModule
from imagen_lightning.diffusion import LowResAugmentation
from imagen_lightning.images import downsample, to_float, upsample
from imagen_lightning.networks import PatchTransformer
from imagen_lightning.types import InputError


def patches(stage_of, patch_size=2):
    def make(**changes):
        network = PatchTransformer(16, 1, patch_size, 8, TEXT_DIM, stage_of is sr_stage, head_dim=8)
        return stage_of(network, **changes)

    return make


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Photographs of three aspects, noise."""
    folder = tmp_path_factory.mktemp("shards")
    generator = np.random.default_rng(0)
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        for number in range(36):
            height, width = [(32, 32), (40, 24), (24, 40)][number % 3]
            buffer = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
            for suffix, data in (("png", buffer.getvalue()), ("txt", b"a dog")):
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(folder)


LARGE = {"image_size": 16, "low_res_size": 4}  # the Efficient U-Net of two levels divides by 4


@pytest.mark.parametrize(
    ("make", "settings"),
    [(base_stage, {}), (sr_stage, LARGE), (patches(base_stage), {}), (patches(sr_stage), {})],
    ids=["base", "super-resolution", "patches", "super-resolution patches"],
)
def test_stages_train_on_buckets_and_sample_squares(make, settings, shards):
    stage = make(**settings)
    size, step = stage.image_size, stage.image_size // 4
    del stage.log
    calls = watch(stage)
    data = LaionDataModule(shards, shards, image_size=size, batch_size=4, crop="bucket", bucket_step=step)
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=9,
        val_check_interval=9,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.fit(stage, datamodule=data)
    shapes = [tuple(x_t.shape) for x_t, _, _ in calls]
    for height, width in ((4, 4), (5, 3), (3, 5)):  # one epoch of 36 samples, a third each
        assert shapes[:-1].count((4, 3, height * step, width * step)) == 3
    assert shapes[-1] == (4, 3, size, size)  # validation
    assert all(math.isfinite(value) for value in trainer.callback_metrics.values())
    low_res = {"low_res": torch.zeros(2, 3, 4, 4)} if hasattr(stage, "low_res_size") else {}
    images = stage.sample(["a dog", "rain"], generators(1, 2), num_steps=2, **low_res)
    assert images.shape == (2, 3, size, size)


def batch_of(height, width, count=3):
    batch = make_batch(range(count))
    batch.images = torch.randint(
        256, (count, 3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    return batch


def test_the_low_resolution_image_has_the_same_aspect():
    stage = sr_stage(augmentation=LowResAugmentation(max_level=0.0), aug_level=0.0)
    x0, conditioning = stage.condition(batch_of(10, 6), 0, training=True)
    assert torch.equal(x0, to_float(batch_of(10, 6).images))
    assert torch.equal(conditioning.low_res, upsample(downsample(x0, (5, 3)), (10, 6)))
    means = x0.unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1))
    assert torch.allclose(downsample(x0, (5, 3)), means, rtol=0, atol=1e-6)


def test_crops_are_as_narrow_as_their_bucket():
    stage = sr_stage(
        image_size=16, low_res_size=4, crop_size=14, augmentation=LowResAugmentation(max_level=0.0), aug_level=0.0
    )
    batch = batch_of(20, 12, 40)
    x0, conditioning = stage.condition(batch, 0, training=True)
    whole = stage.enlarge(downsample(to_float(batch.images), (5, 3)))
    assert x0.shape == conditioning.low_res.shape == (40, 3, 14, 12)
    places = set()
    for image, low_res, cut, low_cut in zip(to_float(batch.images), whole, x0, conditioning.low_res, strict=True):
        (row,) = [row for row in range(7) if torch.equal(image[:, row : row + 14], cut)]
        assert torch.equal(low_res[:, row : row + 14], low_cut)
        places.add(row)
    assert places == set(range(7))


@pytest.mark.parametrize(
    ("make", "size", "message"),
    [
        (base_stage, (9, 7), r"sides divisible by 2, got \(9, 7\)"),
        (patches(base_stage, 4), (10, 6), r"sides divisible by 4, got \(10, 6\)"),
        (base_stage, (16, 8), r"gives images of \(16, 8\) px to a stage of 8 px"),
        (base_stage, (10, 10), r"gives images of \(10, 10\) px to a stage of 8 px"),
        (base_stage, (10, 4), r"gives images of \(10, 4\) px to a stage of 8 px"),
        (sr_stage, (9, 7), r"\(9, 7\) px have no whole low-resolution size at 4 of 8 px; set .*bucket_step .* of 2"),
    ],
)
def test_sizes_that_are_refused(make, size, message):
    with pytest.raises(InputError, match=message):
        make().training_step(batch_of(*size), 0)
