"""Probes against closed forms: a stage that knows pixels alone, one that knows its captions, colours that shift."""

from types import SimpleNamespace

import pytest
import torch
from scipy import stats

from imagen_lightning.diffusion import X0, CosineSchedule, DiffusionProcess, EvenTimes, Plain
from imagen_lightning.images import to_float
from imagen_lightning.metrics.probes import (
    HIGH_TIMES,
    LOW_TIMES,
    colour_shift,
    denoising_ratios,
    text_gains,
    x0_errors,
    z_score,
)
from imagen_lightning.types import Batch, Conditioning

SCHEDULE = CosineSchedule()


class Stage:
    """Predicts x0 by a function of x_t, t and the captions' numbers."""

    def __init__(self, estimate):
        self.process = DiffusionProcess(SCHEDULE, X0(), Plain(), EvenTimes(), None)
        self.network = torch.nn.Linear(1, 1)
        self.estimate = estimate

    def condition(self, batch, seed, training):
        assert not training
        numbers = torch.tensor([float(caption) for caption in batch.captions])[:, None, None, None]
        return to_float(batch.images), Conditioning(text=SimpleNamespace(numbers=numbers))

    def predict(self, x_t, t, conditioning):
        return self.estimate(x_t, t, conditioning.text.numbers)


def batches_of(images, captions, size=7):
    positions = torch.arange(len(images))
    return [
        Batch(images[i : i + size], captions[i : i + size], [""] * len(images[i : i + size]), positions[i : i + size])
        for i in range(0, len(images), size)
    ]


def noise_images(num, side=16):
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([1.0, 0.6, 0.3])[:, None, None]
    values = (torch.rand(num, 3, side, side, generator=generator) - 0.5) * 255 * spread + 120
    return values.round().clamp(0, 255).to(torch.uint8)


def test_errors_are_mean_squares_on_noise_that_positions_fix():
    images = noise_images(10)
    seen = {}

    def nothing(x_t, t, numbers):
        seen.setdefault(round(float(t[0]), 3), []).append(x_t)
        return torch.zeros_like(x_t)

    errors = x0_errors(Stage(nothing), batches_of(images, ["0"] * 10), (0.1, 0.5), seed=3)
    assert errors.shape == (10, 2)
    assert errors.dtype == torch.float64
    wanted = to_float(images).double().square().mean((1, 2, 3))
    assert torch.allclose(errors, wanted[:, None].expand(-1, 2), rtol=1e-6)
    first = torch.cat(seen[0.1])
    seen.clear()
    again = x0_errors(Stage(nothing), batches_of(images, ["0"] * 10, size=10), (0.1,), seed=3)
    assert torch.equal(torch.cat(seen[0.1]), first)
    assert torch.equal(again[:, 0], errors[:, 0])
    seen.clear()
    x0_errors(Stage(nothing), batches_of(images, ["0"] * 10), (0.1,), seed=4)
    assert not torch.allclose(torch.cat(seen[0.1]), first)


def test_the_best_estimate_of_a_pixel_from_itself_has_ratio_one():
    images = noise_images(64)
    pixels = to_float(images).double()
    mean, variance = pixels.mean((0, 2, 3)), pixels.var((0, 2, 3))

    def wiener(x_t, t, numbers):
        alpha, sigma = (part(t.double())[:, None, None, None] for part in (SCHEDULE.alpha, SCHEDULE.sigma))
        m, v = mean[:, None, None], variance[:, None, None]
        return (m + alpha * v / (alpha**2 * v + sigma**2) * (x_t - alpha * m)).float()

    ratios = denoising_ratios(Stage(wiener), batches_of(images, ["0"] * 64), seed=0)
    assert ratios.shape == (64,)
    assert abs(float(ratios.mean()) - 1) < 3 * float(ratios.std()) / 8
    assert float(ratios.std()) / 8 < 0.01


def test_the_ratio_of_what_gives_back_its_input():
    """sigma^2 / alpha^2 over sigma^2 v / (alpha^2 v + sigma^2) = 1 + sigma^2 / (alpha^2 v), one v for all channels."""
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(64, 3, 16, 16, generator=generator) * 255).round().to(torch.uint8)
    variance = float(to_float(images).double().var())
    t = torch.tensor(LOW_TIMES, dtype=torch.float64)
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    back = Stage(lambda x_t, t, _: x_t / SCHEDULE.alpha(t)[:, None, None, None])
    ratios = denoising_ratios(back, batches_of(images, ["0"] * 64), seed=0)
    wanted = float((1 + sigma**2 / (alpha**2 * variance)).mean())
    assert float(ratios.mean()) == pytest.approx(wanted, rel=0.01)


def test_a_stage_that_knows_all_has_ratio_zero_and_images_of_one_colour_divide_nothing():
    images = torch.full((4, 3, 8, 8), 255, dtype=torch.uint8)
    ratios = denoising_ratios(Stage(lambda x_t, *_: torch.ones_like(x_t)), batches_of(images, ["0"] * 4), seed=0)
    assert torch.equal(ratios, torch.zeros(4, dtype=torch.float64))


def levels(numbers):
    return torch.stack([torch.full((3, 4, 4), number, dtype=torch.uint8) for number in numbers])


def test_what_captions_save():
    """Image i is of one value x_i, and the estimate is half of the caption's: errors (x_i - x_j / 2)^2."""
    numbers = [0, 51, 102, 51, 255]
    values = [number / 127.5 - 1 for number in numbers]
    stage = Stage(lambda x_t, t, numbers: (0.5 * (numbers / 127.5 - 1)).expand_as(x_t))
    gains = text_gains(stage, batches_of(levels(numbers), [str(number) for number in numbers], size=2), seed=0)
    others = values[1:] + values[:1]  # the first rotation that changes every caption
    true = torch.tensor([(x - x / 2) ** 2 for x in values], dtype=torch.float64)
    false = torch.tensor([(x - y / 2) ** 2 for x, y in zip(values, others)], dtype=torch.float64)
    assert torch.allclose(gains, (false - true) / false.mean(), rtol=1e-5)


def test_equal_captions_do_not_count():
    seen = []

    def estimate(x_t, t, numbers):
        seen.append(numbers.flatten().tolist())
        return numbers.expand_as(x_t)

    captions = ["1", "1", "1", "2"]
    gains = text_gains(Stage(estimate), batches_of(levels([10, 20, 30, 40]), captions), seed=0)
    assert gains.shape == (2,)
    assert seen[0] == [1, 1, 1, 2]
    assert seen[len(HIGH_TIMES)] == [1, 1, 2, 1]
    assert text_gains(Stage(estimate), batches_of(levels([1, 2]), ["5", "5"]), seed=0).shape == (0,)


def test_standard_errors_are_those_of_a_t_test():
    numbers = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.3
    assert z_score(numbers) == pytest.approx(float(stats.ttest_1samp(numbers.numpy(), 0).statistic), rel=1e-12)
    assert z_score(torch.zeros(5, dtype=torch.float64)) == 0


def test_colours_that_shift():
    low = noise_images(3, side=4).clamp(30, 200)
    images = low.repeat_interleave(4, -1).repeat_interleave(4, -2)
    assert torch.equal(colour_shift(images, low), torch.zeros(3, dtype=torch.float64))
    shifted = images.clone()
    shifted[1, 0] += 9
    shifted[2] -= 6
    assert colour_shift(shifted, low).tolist() == pytest.approx([0, 3, 6], abs=1e-9)
    wide = torch.cat([images, images], dim=-1)
    assert colour_shift(wide, torch.cat([low, low], dim=-1)).tolist() == [0, 0, 0]
