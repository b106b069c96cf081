"""The bound of a whole stage: on Gaussian data against its entropy, and for the stages of a cascade."""

import math
from types import SimpleNamespace

import pytest
import torch
from scipy import stats
from tiny_stages import TEXT_DIM, base_stage, make_batch, sr_stage

from imagen_lightning.diffusion import (
    X0,
    CosineSchedule,
    DiffusionProcess,
    DiscreteSchedule,
    LearnedRange,
    LinearSchedule,
    Plain,
)
from imagen_lightning.diffusion.process import per_image
from imagen_lightning.diffusion.vlb import step_variances
from imagen_lightning.images import to_float
from imagen_lightning.metrics import variational_bound
from imagen_lightning.networks import UNet
from imagen_lightning.stages import Diffusion
from imagen_lightning.types import Batch, Conditioning, InputError

MEAN, SPREAD = 0.05, 0.25


def gaussian_batch(count, first=0, size=8):
    generator = torch.Generator().manual_seed(first)
    x0 = MEAN + SPREAD * torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)
    images = ((x0 + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Batch(images, [""] * count, [str(i) for i in range(count)], torch.arange(first, first + count))


class BestStage:
    """The best reverse process of independent Gaussian pixels: E[x0 | x_t], and the variance of x_s given x_t."""

    def __init__(self, schedule, num_steps=1000, learned=True):
        self.network = torch.nn.Identity()
        self.process = DiffusionProcess(schedule, X0(), Plain(), variance=LearnedRange() if learned else None)
        self.num_steps = num_steps
        self.times = []

    def condition(self, batch, seed, training):
        assert not training
        return to_float(batch.images).double(), Conditioning()

    def predict(self, x_t, t, conditioning):
        self.times.append(t)
        schedule = self.process.schedule
        alpha, sigma = (per_image(f(t), x_t) for f in (schedule.alpha, schedule.sigma))
        total = alpha**2 * SPREAD**2 + sigma**2
        estimate = MEAN + alpha * SPREAD**2 / total * (x_t - alpha * MEAN)
        if self.process.variance is None:
            return estimate
        s = (t - 1 / self.num_steps).clamp(min=0)
        s = torch.where(s < 1e-9, torch.zeros_like(s), s)
        small, large = (per_image(value, x_t) for value in step_variances(schedule, t, s))
        share = per_image(schedule.alpha(s) / schedule.sigma(t) ** 2, x_t) * large
        variance = torch.where(per_image(s, x_t) > 0, small, 0.0) + share**2 * SPREAD**2 * sigma**2 / total
        fraction = torch.log(variance / small) / torch.log(large / small)
        return torch.cat([estimate, (2 * fraction - 1).expand_as(x_t)], dim=1)


def entropy(count=100_000):
    """Bits a pixel of the rounded Gaussian."""
    edges = torch.cat([torch.tensor([-math.inf]), (torch.arange(255) + 0.5) / 127.5 - 1, torch.tensor([math.inf])])
    cdf = torch.from_numpy(stats.norm(MEAN, SPREAD).cdf(edges.double().numpy()))
    shares = cdf.diff()
    return float(-(shares * torch.log2(shares.clamp(min=1e-300))).sum())


@pytest.mark.parametrize("schedule", [LinearSchedule(), DiscreteSchedule("squaredcos_cap_v2")])
def test_the_best_reverse_process_reaches_the_entropy_of_its_data(schedule):
    batches = [gaussian_batch(10, first) for first in (0, 10)]
    bound = variational_bound(BestStage(schedule), batches)
    pixels = torch.cat([to_float(batch.images).double() for batch in batches])
    # of these very images, whose mean square differs a little from the data's
    nats = math.log(SPREAD * math.sqrt(2 * math.pi)) + ((pixels - MEAN) ** 2).mean() / (2 * SPREAD**2)
    expected = float(nats) / math.log(2) + math.log2(127.5)
    assert expected == pytest.approx(entropy(), abs=0.03)
    # a Gaussian's reverse process is Gaussian in any number of steps: the bound is tight but for the noise drawn
    assert bound.mean()["total"] == pytest.approx(expected, abs=0.03)
    assert bound.total.shape == (20,)
    assert torch.allclose(bound.total, bound.prior + bound.diffusion + bound.decoder)
    assert torch.allclose(bound.terms[1:].sum(), bound.diffusion.mean())
    assert torch.allclose(bound.terms[0], bound.decoder.mean())
    assert bound.prior.max() < 1e-5


def test_a_schedule_that_ends_within_the_8_bits_pays_for_digits_that_are_not_there():
    # at t = 1/1000 the cosine's sigma is 0.0016, less than the levels' 0.0078; a Gaussian does not know of levels
    batch = [gaussian_batch(10)]
    totals = [variational_bound(BestStage(CosineSchedule(), n), batch, num_steps=n).mean()["total"] for n in (100, 400)]
    assert totals[1] > totals[0] + 0.01


def test_fixed_variances_are_looser():
    batch = [gaussian_batch(10)]
    best = variational_bound(BestStage(CosineSchedule(), 100), batch, num_steps=100).mean()["total"]
    plain = BestStage(CosineSchedule(), learned=False)
    small = variational_bound(plain, batch, num_steps=100).mean()["total"]
    large = variational_bound(plain, batch, num_steps=100, variance="large").mean()["total"]
    assert best < min(small, large) - 0.02
    assert abs(small - large) > 0.05


def test_a_sample_of_steps_estimates_the_sum():
    stage, batches = BestStage(DiscreteSchedule(), learned=False), [gaussian_batch(200, size=4)]
    whole = variational_bound(stage, batches, num_steps=50)
    stage.times.clear()
    some = variational_bound(stage, batches, num_steps=50, steps_per_image=7)
    assert len(stage.times) == 8
    steps = torch.stack(stage.times[1:]) * 50 - 1
    assert torch.allclose(steps, steps.round(), atol=1e-6)
    assert sorted(set(steps.flatten().round().int().tolist())) == list(range(1, 50))
    assert all(len(row.round().unique()) == 7 for row in steps.T)
    standard_error = float((some.diffusion - whole.diffusion).std()) / math.sqrt(200)
    assert float(some.diffusion.mean()) == pytest.approx(float(whole.diffusion.mean()), abs=4 * standard_error)
    assert standard_error > 1e-4
    assert torch.equal(some.decoder, whole.decoder)
    assert torch.equal(some.prior, whole.prior)
    assert some.terms.isfinite().all()


class Doubled(torch.nn.Module):
    """A network with channels for the variance, from one without."""

    out_channels, text_dim = 6, TEXT_DIM

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.raw = torch.nn.Conv2d(3, 3, 1)

    def forward(self, x_t, time, conditioning):
        return torch.cat([self.network(x_t, time, conditioning), self.raw(x_t)], dim=1)


def with_learned_variance():
    network = UNet(
        dim=8, multipliers=[1], num_blocks=1, attention=[True], head_dim=8, groups=4, text_dim=TEXT_DIM
    )  # fmt: skip
    return base_stage(Doubled(network), diffusion=Diffusion(DiscreteSchedule(), variance=LearnedRange()))


@pytest.mark.parametrize("make", [base_stage, sr_stage, with_learned_variance])
def test_any_stage_has_its_bound(make):
    stage = make()
    state = torch.get_rng_state()
    batches = [make_batch([0, 1, 2]), make_batch([3])]
    bound = variational_bound(stage, batches, num_steps=12)
    assert bound.total.shape == (4,)
    assert bound.total.isfinite().all()
    assert set(bound.mean()) == {"total", "prior", "diffusion", "decoder"}
    # an untrained network knows less than a code of eight bits a pixel
    assert bound.mean()["total"] > 8
    assert stage.training
    assert torch.equal(torch.get_rng_state(), state)
    # noise is a function of the position: the batches do not matter
    again = variational_bound(stage, [make_batch([0]), make_batch([1, 2, 3])], num_steps=12)
    assert torch.allclose(again.total, bound.total, rtol=1e-3)
    assert not torch.allclose(variational_bound(stage, batches, num_steps=12, seed=1).total, bound.total, rtol=1e-3)


def test_what_cannot_be_measured():
    stage = SimpleNamespace(network=torch.nn.Identity())
    for options, message in [
        ({"variance": "medium"}, "'medium'"),
        ({"num_steps": 1}, "num_steps 1"),
        ({"num_steps": 10, "steps_per_image": 10}, r"steps_per_image 10 must be in 1\.\.9"),
        ({}, "at least one batch"),
    ]:
        with pytest.raises(InputError, match=message):
            variational_bound(stage, [], **options)
