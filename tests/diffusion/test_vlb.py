"""The bound's terms against closed forms for Gaussian data, whose best denoiser is known."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from imagen_lightning.diffusion import (
    X0,
    CosineSchedule,
    DiffusionProcess,
    DiscreteSchedule,
    Epsilon,
    FlowSchedule,
    LearnedRange,
    Plain,
)
from imagen_lightning.diffusion.vlb import bound_terms, discretized_log_likelihood, prior_term, step_variances
from imagen_lightning.types import Denoised, InputError

SCHEDULES = [CosineSchedule(), FlowSchedule(), DiscreteSchedule(), DiscreteSchedule("squaredcos_cap_v2")]
LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1
MEAN, SPREAD = 0.1, 0.3


def time(value):
    return torch.tensor([value], dtype=torch.float64)


def levels(schedule, t):
    return float(schedule.alpha(t)), float(schedule.sigma(t))


@pytest.mark.parametrize("mean", [-1.2, -1.0, -0.3, 0.0, 0.5003, 0.9, 1.0])
@pytest.mark.parametrize("log_variance", [-14.0, -8.0, -3.0, 1.0])
def test_likelihoods_of_all_levels_sum_to_one(mean, log_variance):
    given = torch.full_like(LEVELS, mean), torch.full_like(LEVELS, log_variance)
    likelihoods = discretized_log_likelihood(LEVELS, *given).exp()
    assert float(likelihoods.sum()) == pytest.approx(1, abs=1e-12)
    normal = stats.norm(mean, math.exp(log_variance / 2))
    edges = np.concatenate([[-np.inf], (LEVELS[:-1] + 1 / 255).numpy(), [np.inf]])
    assert np.allclose(likelihoods.numpy(), np.diff(normal.cdf(edges)), rtol=0, atol=1e-12)


def test_likelihoods_keep_their_digits_in_the_tails():
    x0, mean = torch.tensor([0.5, -0.5, 0.6], dtype=torch.float64), torch.tensor([-0.5, 0.5, 0.0], dtype=torch.float64)
    x0 = (x0 * 127.5).round() / 127.5
    log_variance = torch.full_like(x0, 2 * math.log(0.02))
    normal = stats.norm()
    near, far = ((np.abs((x0 - mean).numpy()) + side / 255) / 0.02 for side in (-1, 1))
    found = discretized_log_likelihood(x0, mean, log_variance).numpy()
    expected = normal.logsf(near) + np.log1p(-np.exp(normal.logsf(far) - normal.logsf(near)))
    assert np.allclose(found, expected, rtol=1e-12)
    assert found.max() < -400


def test_gradients_are_finite_far_from_the_image():
    mean = torch.tensor([-50.0, -1.0, 0.0, 1.0, 50.0], requires_grad=True)
    log_variance = torch.full((5,), -12.0, requires_grad=True)
    for x0 in (-1.0, 0.0, 1.0):
        likelihood = discretized_log_likelihood(torch.full((5,), x0), mean, log_variance)
        gradients = torch.autograd.grad(likelihood.sum(), (mean, log_variance))
        assert likelihood.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_prior_term_is_a_divergence_of_gaussians(schedule):
    x0 = LEVELS.view(1, 1, 16, 16)
    alpha, sigma = levels(schedule, time(1.0))
    expected = [((alpha * x) ** 2 + sigma**2 - 1 - 2 * math.log(sigma)) / 2 for x in LEVELS.tolist()]
    assert float(prior_term(x0, schedule)) == pytest.approx(np.mean(expected) / math.log(2), rel=1e-12)
    assert float(prior_term(x0, CosineSchedule())) < 1e-8


@pytest.mark.parametrize("num_steps", [1000, 10])
@pytest.mark.parametrize("betas", ["linear", "squaredcos_cap_v2"])
def test_variances_of_a_table(betas, num_steps):
    # Ho et al. 2020, eqs. 4 and 7, and Nichol & Dhariwal's first step
    schedule = DiscreteSchedule(betas, num_steps)
    abar = schedule.alphas_cumprod
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    beta = 1 - abar / before
    small = beta * (1 - before) / (1 - abar)
    small[0] = small[1]
    t = (torch.arange(num_steps, dtype=torch.float64) + 1) / num_steps
    found = step_variances(schedule, t, torch.cat([time(0.0), t[:-1]]))
    assert torch.allclose(found[0], small, rtol=1e-9, atol=0)
    assert torch.allclose(found[1], beta, rtol=1e-9, atol=0)


def best(schedule, x_t, t):
    """E[x0 | x_t] of N(MEAN, SPREAD^2), and the variance that is left."""
    alpha, sigma = levels(schedule, t)
    total = alpha**2 * SPREAD**2 + sigma**2
    return MEAN + alpha * SPREAD**2 / total * (x_t - alpha * MEAN), SPREAD**2 * sigma**2 / total


@pytest.mark.parametrize("v", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("k", [1, 30, 500, 999])
def test_terms_of_the_best_denoiser(schedule, k, v):
    t, s, n = time((k + 1) / 1000), time(k / 1000), 100_000
    generator = torch.Generator().manual_seed(k)
    x0 = MEAN + SPREAD * torch.randn(n, 1, 1, 1, dtype=torch.float64, generator=generator)
    (alpha, sigma), (alpha_s, sigma_s) = levels(schedule, t), levels(schedule, s)
    x_t = alpha * x0 + sigma * torch.randn(x0.shape, dtype=torch.float64, generator=generator)
    estimate, left = best(schedule, x_t, t)
    found = bound_terms(Denoised(estimate, torch.full_like(x0, v)), x0, t.expand(n), s.expand(n), schedule)
    large = sigma**2 - (alpha / alpha_s) ** 2 * sigma_s**2
    small = large * sigma_s**2 / sigma**2
    variance = large**v * small ** (1 - v)
    error = (alpha_s * large / sigma**2) ** 2 * left
    expected = (math.log(variance / small) + small / variance - 1 + error / variance) / 2 / math.log(2)
    assert float(found.mean()) == pytest.approx(expected, abs=4 * float(found.std()) / math.sqrt(n) + 1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("v", [0.0, 1.0])
def test_the_last_term_is_the_decoders(schedule, v):
    # E over epsilon of -log p(x0 | x_t), by Gauss-Hermite quadrature for each of a few levels
    t, s = time(1 / 1000), time(0.0)
    alpha, sigma = levels(schedule, t)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    x0 = LEVELS[[0, 60, 128, 200, 255]]
    x_t = alpha * x0[:, None] + sigma * torch.from_numpy(nodes)
    mean, _ = best(schedule, x_t, t)
    small, large = (float(value) for value in step_variances(schedule, t, s))
    normal = stats.norm(mean.numpy(), math.sqrt(large**v * small ** (1 - v)))
    upper = np.where(x0 > 1 - 1 / 255, np.inf, x0 + 1 / 255)[:, None]
    lower = np.where(x0 < -1 + 1 / 255, -np.inf, x0 - 1 / 255)[:, None]
    nats = -np.log(np.maximum(normal.cdf(upper) - normal.cdf(lower), 1e-300))
    expected = (nats * weights).sum(1) / weights.sum() / math.log(2)
    images = x0[:, None].expand(-1, 60).reshape(-1, 1, 1, 1)
    denoised = Denoised(mean.reshape(-1, 1, 1, 1), torch.full_like(images, v))
    found = bound_terms(denoised, images, t.expand(300), s.expand(300), schedule).view(5, 60)
    assert np.allclose((found.numpy() * weights).sum(1) / weights.sum(), expected, rtol=1e-6, atol=1e-9)


# ---- the learned range and L_hybrid


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    x0 = (255 * torch.rand(3, 3, 4, 4, generator=generator)).round() / 127.5 - 1
    epsilon, output = torch.randn(3, 3, 4, 4, generator=generator), torch.randn(3, 6, 4, 4, generator=generator)
    return x0, epsilon, output


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_hybrid_loss(schedule, images):
    x0, epsilon, output = images
    t = torch.tensor([0.001, 0.002, 0.8])
    process = DiffusionProcess(schedule, Epsilon(), Plain(), variance=LearnedRange(0.01, num_steps=1000))
    output.requires_grad_()
    losses = process.losses(output, x0, epsilon, t)
    x_t = process.add_noise(x0, epsilon, t)
    denoised = Denoised(process.x0(output, x_t, t), (output[:, 3:] + 1) / 2)
    # Nichol & Dhariwal 2021, eq. 16
    terms = bound_terms(denoised, x0, t, torch.tensor([0.0, 0.001, 0.799]), schedule)
    simple = (output[:, :3] - epsilon).square().mean((1, 2, 3))
    assert torch.allclose(losses, simple + 0.01 * 1000 * terms, rtol=1e-3)
    assert (terms > 0).all()
    # the bound trains the variance alone
    hybrid, alone = (torch.autograd.grad(loss.sum(), output, retain_graph=True)[0] for loss in (losses, simple))
    assert torch.allclose(hybrid[:, :3], alone[:, :3])
    assert (alone[:, 3:] == 0).all()
    assert (hybrid[:, 3:] != 0).all()
    assert hybrid.isfinite().all()


def test_the_bound_finds_the_variance_that_is_right():
    # data of one point: the posterior's own variance, v = 0, i.e. -1 in the network's channel
    schedule, t = CosineSchedule(), torch.full((64,), 0.1, dtype=torch.float64)
    process = DiffusionProcess(schedule, X0(), Plain(), variance=LearnedRange(1.0))
    raw = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    x0 = torch.zeros(64, 1, 1, 1, dtype=torch.float64)
    optimizer = torch.optim.LBFGS([raw], line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        output = torch.cat([x0, raw.expand(64, 1, 1, 1)], dim=1)
        value = process.losses(output, x0, torch.randn_like(x0), t).mean()
        value.backward()
        return value

    optimizer.step(loss)
    assert raw.item() == pytest.approx(-1, abs=1e-4)


def test_channels_that_do_not_agree(images):
    x0, epsilon, output = images
    t = torch.full((3,), 0.5)
    plain = DiffusionProcess(CosineSchedule(), Epsilon(), Plain())
    learned = DiffusionProcess(CosineSchedule(), Epsilon(), Plain(), variance=LearnedRange())
    for process, given, message in [(plain, output, "6 channels; its stage takes 3"),
                                    (learned, output[:, :3], "3 channels; its stage takes 6")]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            process.losses(given, x0, epsilon, t)
        with pytest.raises(InputError, match=message):
            process.x0(given, x0, t)
    with pytest.raises(InputError, match="not learned"):
        plain.denoised(output[:, :3], x0, t)
    denoised = learned.denoised(output, x0, t)
    assert torch.equal(denoised.x0, plain.x0(output[:, :3], x0, t))
    assert torch.equal(denoised.variance, (output[:, 3:] + 1) / 2)
    with pytest.raises(InputError, match="vlb_weight -1"):
        LearnedRange(-1.0)
