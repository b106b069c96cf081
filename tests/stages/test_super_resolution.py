import pytest
import torch
from tiny_stages import base_stage, generators, make_batch, sr_stage, watch

from imagen_lightning.diffusion import DiscreteSchedule, LowResAugmentation
from imagen_lightning.diffusion.random import Stream, normal
from imagen_lightning.images import downsample, to_float, upsample
from imagen_lightning.types import InputError

CPU = torch.device("cpu")


def test_level_0_is_the_enlarged_image_to_the_bit():
    stage = sr_stage(augmentation=LowResAugmentation(max_level=0.0), aug_level=0.0)
    batch = make_batch(range(3))
    x0, conditioning = stage.condition(batch, 0, training=True)
    assert torch.equal(x0, to_float(batch.images))
    assert torch.equal(conditioning.low_res, upsample(downsample(x0, 4), 8))
    assert torch.equal(conditioning.aug_level, torch.zeros(3))
    low_res = downsample(x0, 4)
    enlarged, level = sr_stage().prepare_low_res(low_res, 0.0, generators(1, 2, 3), CPU)
    assert torch.equal(enlarged, upsample(low_res, 8))
    assert torch.equal(level, torch.zeros(3))


def test_training_noises_at_a_level_a_sample_and_says_which():
    stage = sr_stage(augmentation=LowResAugmentation(max_level=0.5))
    batch = make_batch(range(200))
    x0, conditioning = stage.condition(batch, 7, training=True)
    level = conditioning.aug_level
    assert 0 < level.min() < 0.05
    assert 0.45 < level.max() < 0.5
    angle = (level * torch.pi / 2).view(-1, 1, 1, 1)
    noise = normal(7, Stream.AUG_NOISE, batch.positions, (3, 8, 8))
    expected = torch.cos(angle) * upsample(downsample(x0, 4), 8) + torch.sin(angle) * noise
    assert torch.allclose(conditioning.low_res, expected, atol=1e-6)
    # apart from the noise of the image itself
    correlation = torch.corrcoef(
        torch.stack([noise.flatten(), normal(7, Stream.NOISE, batch.positions, (3, 8, 8)).flatten()])
    )
    assert abs(float(correlation[0, 1])) < 4 / noise.numel() ** 0.5
    stage.training_step(batch, 0)
    assert torch.equal(stage.record.aug_level, stage.condition(batch, 0, training=True)[1].aug_level)


def coordinates(positions):
    """Images whose red says the row and whose green the column."""
    batch = make_batch(positions, size=16)
    rows = torch.arange(16, dtype=torch.uint8)
    batch.images[:, 0] = rows[:, None]
    batch.images[:, 1] = rows[None, :]
    return batch


def test_crops_of_image_and_low_res_are_the_same_place():
    stage = sr_stage(
        image_size=16, low_res_size=4, crop_size=8, augmentation=LowResAugmentation(max_level=0.0), aug_level=0.0
    )
    batch = coordinates(range(300))
    x0, conditioning = stage.condition(batch, 0, training=True)
    whole = stage.enlarge(downsample(to_float(batch.images), 4))
    places = set()
    for i in range(len(batch)):
        corner = ((x0[i, :2, 0, 0] + 1) * 127.5).round().int().tolist()
        places.add(tuple(corner))
        square = (slice(None), slice(corner[0], corner[0] + 8), slice(corner[1], corner[1] + 8))
        assert torch.equal(x0[i], to_float(batch.images[i])[square])
        assert torch.equal(conditioning.low_res[i], whole[i][square])
    assert {row for row, _ in places} == {column for _, column in places} == set(range(9))
    assert len(places) > 70  # of 81: rows and columns are drawn apart
    x0, conditioning = stage.condition(batch, 0, training=False)
    assert x0.shape == conditioning.low_res.shape == (300, 3, 16, 16)


def test_sampling_noises_low_res_with_each_images_generator():
    stage = sr_stage(aug_level=0.25)
    low_res = 2 * torch.rand(2, 3, 4, 4) - 1
    result, level = stage.prepare_low_res(low_res, None, generators(5, 6), CPU)
    assert torch.equal(level, torch.full((2,), 0.25))
    noise = torch.stack([torch.randn(3, 8, 8, generator=g) for g in generators(5, 6)])
    angle = torch.tensor(0.25 * torch.pi / 2)
    assert torch.allclose(result, torch.cos(angle) * upsample(low_res, 8) + torch.sin(angle) * noise, atol=1e-6)
    _, level = stage.prepare_low_res(low_res, 0.75, generators(5, 6), CPU)
    assert torch.equal(level, torch.full((2,), 0.75))


def test_low_res_that_does_not_fit():
    stage = sr_stage(augmentation=LowResAugmentation(max_level=0.5))
    good = torch.zeros(1, 3, 4, 4)
    for low_res, level, message in [
        (None, None, "needs low_res"),
        (torch.zeros(1, 3, 8, 8), None, r"\(8, 8\) px given to a stage for 4 px"),
        (good, 0.6, r"aug_level 0\.6 must be in \[0, 0\.5\]"),
        (good, -0.1, r"aug_level -0\.1"),
    ]:
        with pytest.raises(InputError, match=message):
            stage.sample(["a dog"], generators(1), low_res=low_res, aug_level=level, num_steps=1)
    with pytest.raises(InputError, match="takes no low_res"):
        base_stage().sample(["a dog"], generators(1), low_res=good, num_steps=1)
    with pytest.raises(InputError, match="takes no low_res"):
        base_stage().sample(["a dog"], generators(1), aug_level=0.1, num_steps=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low_res_size": 8}, "low_res_size 8"),
        ({"low_res_size": 0}, "low_res_size 0"),
        ({"crop_size": 9}, "crop_size 9"),
        ({"aug_level": 1.1}, r"aug_level 1\.1"),
        ({"aug_level": 0.3, "augmentation": LowResAugmentation(max_level=0.2)}, r"aug_level 0\.3"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    with pytest.raises(InputError, match=message):
        sr_stage(**change)


def test_guided_sampling_gives_both_halves_the_same_low_res():
    stage = sr_stage()
    low_res = 2 * torch.rand(2, 3, 4, 4) - 1
    calls = watch(stage)
    images = stage.sample(["a dog", "rain"], generators(1, 2), guidance=2.0, num_steps=2, low_res=low_res)
    assert images.shape == (2, 3, 8, 8)
    assert images.abs().max() <= 1
    for x_t, _, conditioning in calls:
        for given in (x_t, conditioning.low_res, conditioning.aug_level):
            assert len(given) == 4
            assert torch.equal(given[:2], given[2:])


# ---- as DeepFloyd IF has it


def test_levels_of_a_table_are_its_steps():
    table = DiscreteSchedule("squaredcos_cap_v2")
    augmentation = LowResAugmentation(table)
    low_res, noise = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    for steps in ([0, 1, 250, 998], [999, 333, 17, 511]):
        level = torch.tensor(steps) / 1000  # float32
        alpha2 = table.alphas_cumprod[steps].view(-1, 1, 1, 1)
        expected = alpha2.sqrt() * low_res + (1 - alpha2).sqrt() * noise
        assert torch.allclose(augmentation(low_res, level, noise), expected, rtol=0, atol=1e-6)
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    steps, counts = (augmentation.levels(u) * 1000).round().long().unique(return_counts=True)
    assert steps.tolist() == list(range(1000))
    assert counts.unique().tolist() == [100]
    half = LowResAugmentation(table, max_level=0.5).levels(u)
    assert half.max() == pytest.approx(0.499)
    assert half.min() == 0
    assert torch.equal(LowResAugmentation(max_level=0.5).levels(u), 0.5 * u)


def test_training_on_a_tables_levels_tells_the_step_that_the_image_was_noised_at():
    table = DiscreteSchedule("squaredcos_cap_v2")
    stage = sr_stage(augmentation=LowResAugmentation(table), upsampling="bilinear_aligned")
    batch = make_batch(range(20))
    x0, conditioning = stage.condition(batch, 7, training=True)
    steps = conditioning.aug_level * 1000
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    alpha2 = table.alphas_cumprod.float()[steps.round().long()].view(-1, 1, 1, 1)
    noise = normal(7, Stream.AUG_NOISE, batch.positions, (3, 8, 8))
    enlarged = torch.nn.functional.interpolate(downsample(x0, 4), size=(8, 8), mode="bilinear", align_corners=True)
    expected = alpha2.sqrt() * enlarged + (1 - alpha2).sqrt() * noise
    assert torch.allclose(conditioning.low_res, expected, atol=1e-5)


def test_aligned_upsampling_keeps_the_corners_place():
    low_res = 2 * torch.rand(1, 3, 4, 4) - 1
    aligned, plain = sr_stage(upsampling="bilinear_aligned").enlarge(low_res), sr_stage().enlarge(low_res)
    corners = (slice(None), slice(None), [0, 0, -1, -1], [0, -1, 0, -1])
    assert torch.equal(aligned[corners], low_res[corners])
    assert not torch.allclose(aligned, plain, atol=1e-2)
    with pytest.raises(InputError, match="upsampling 'bicubic' is unknown; use 'bilinear' or 'bilinear_aligned'"):
        sr_stage(upsampling="bicubic")
