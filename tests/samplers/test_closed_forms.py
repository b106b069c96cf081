"""Samplers against problems whose solution is known, in float64."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import solve_ivp

from imagen_lightning.diffusion import (
    CosineSchedule,
    DiscreteSchedule,
    FlowSchedule,
    LinearSchedule,
    ShiftedCosineSchedule,
    SigmoidSchedule,
)
from imagen_lightning.samplers import DDIM, DDPM, DPMSolverPP, DPMSolverPPSDE, Heun
from imagen_lightning.types import Denoised, InputError

SCHEDULES = [CosineSchedule(), ShiftedCosineSchedule(256), FlowSchedule()]
MORE_SCHEDULES = [*SCHEDULES, LinearSchedule(), SigmoidSchedule()]
MEAN, SPREAD = 0.3, 0.5


def levels(schedule, t):
    return float(schedule.alpha(t)), float(schedule.sigma(t))


def gaussian_denoiser(schedule, mean=MEAN, spread=SPREAD):
    """E[x0 | x_t] for x0 ~ N(mean, spread^2)."""

    def denoise(x, t):
        alpha, sigma = (f(t).view(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
        return mean + alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * (x - alpha * mean)

    return denoise


def gaussian_flow(schedule, z, t):
    """Where the probability flow of N(MEAN, SPREAD^2) is at t: a fixed number of standard deviations from the mean."""
    alpha, sigma = levels(schedule, t)
    return alpha * MEAN + math.sqrt(alpha**2 * SPREAD**2 + sigma**2) * z


def even_times(schedule, n, low=-6.0, high=6.0):
    return schedule.time_at(torch.linspace(low, high, n + 1, dtype=torch.float64))


def noise(count, seed=0):
    return torch.randn(count, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orders(errors):
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


@pytest.mark.parametrize("schedule", MORE_SCHEDULES)
@pytest.mark.parametrize(("sampler", "order"), [(DDIM(), 1), (DPMSolverPP(), 2), (Heun(), 2)])
def test_order_of_convergence_on_a_gaussian(schedule, sampler, order):
    z = noise(8)
    errors = []
    for n in (40, 80, 160, 320):
        times = even_times(schedule, n)
        x = gaussian_flow(schedule, z, times[0])
        result = sampler(gaussian_denoiser(schedule), x, times, schedule=schedule)
        errors.append(float((result - gaussian_flow(schedule, z, times[-1])).abs().max()))
    assert orders(errors) == pytest.approx([order] * 3, abs=0.15)
    assert errors[-1] < (1e-2 if order == 1 else 1e-4)


class Mixture:
    """x0 is one of a few Gaussians of one spread."""

    centres, weights, spread = np.array([-0.9, 0.1, 0.8]), np.array([0.5, 0.2, 0.3]), 0.15

    def denoise(self, x, alpha, sigma):
        variance = alpha**2 * self.spread**2 + sigma**2
        distance = x[..., None] - alpha * self.centres
        logits = np.log(self.weights) - distance**2 / (2 * variance)
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        return (shares * (self.centres + alpha * self.spread**2 / variance * distance)).sum(-1)

    def flow(self, x, schedule, low, high):
        """The probability flow from one log-SNR to another: d(x / alpha) / d log(sigma / alpha) = x / alpha - x0."""

        def slope(log_ratio, y):
            alpha, sigma = levels(schedule, schedule.time_at(torch.tensor(-2 * log_ratio, dtype=torch.float64)))
            return y - self.denoise(alpha * y, alpha, sigma)

        alphas = [levels(schedule, schedule.time_at(torch.tensor(end, dtype=torch.float64)))[0] for end in (low, high)]
        solution = solve_ivp(slope, (-low / 2, -high / 2), x / alphas[0], method="DOP853", rtol=1e-10, atol=1e-12)
        return solution.y[:, -1] * alphas[1]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_mixture_against_a_fine_solution(schedule):
    mixture, start = Mixture(), np.linspace(-2, 2, 9)
    exact = mixture.flow(start, schedule, -6.0, 6.0)

    def denoise(x, t):
        alpha, sigma = levels(schedule, t[0])
        return torch.from_numpy(mixture.denoise(x.numpy(), alpha, sigma))

    errors = {}
    for sampler in (DDIM(), DPMSolverPP(), Heun()):
        for n in (100, 200, 400):
            x = torch.from_numpy(start).view(-1, 1, 1, 1)
            result = sampler(denoise, x, even_times(schedule, n), schedule=schedule).flatten().numpy()
            errors.setdefault(type(sampler), []).append(np.abs(result - exact).max())
    assert orders(errors[DDIM]) == pytest.approx([1, 1], abs=0.3)
    for second in (DPMSolverPP, Heun):
        assert orders(errors[second]) == pytest.approx([2, 2], abs=0.3)
        assert errors[second][-1] < 2e-3


@pytest.mark.parametrize("schedule", MORE_SCHEDULES)
@pytest.mark.parametrize(("sampler", "order"), [(DPMSolverPPSDE(), 2), (DDPM("small"), 1), (DDIM(1.0), 1)])
def test_weak_order_of_stochastic_samplers_on_a_gaussian(schedule, sampler, order):
    """x_s is linear in x_t and the noise of each step: one image a noise gives its share, and so the exact moments."""

    def moments(n):
        times = even_times(schedule, n)
        shares = torch.zeros(n + 2, 1, 1, 1, dtype=torch.float64)
        shares[0] = 1  # begins at 1 beside the flow's mean; image 1 at the mean; image i + 2 has the noise of step i
        steps = iter(range(n))

        def one_image_a_step(x, generator):
            noise = torch.zeros_like(x)
            noise[next(steps) + 2] = 1
            return noise

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"{type(sampler).__module__}.noise_like", one_image_a_step)
            begin = levels(schedule, times[0])[0] * MEAN + shares
            x = sampler(gaussian_denoiser(schedule), begin, times, schedule=schedule).flatten()
        alpha_t, sigma_t = levels(schedule, times[0])
        alpha_s, sigma_s = levels(schedule, times[-1])
        total_t, total_s = (a**2 * SPREAD**2 + b**2 for a, b in ((alpha_t, sigma_t), (alpha_s, sigma_s)))
        # q(x_s | x_t) of the data: jointly normal, with covariance alpha_t / alpha_s var(x_s)
        slope = alpha_t / alpha_s * total_s / total_t
        left = total_s - slope**2 * total_t
        # the mean given x_t is exact: the estimates of x0 along a path keep their expectation
        assert float(x[1]) == pytest.approx(alpha_s * MEAN, abs=1e-12)
        assert float(x[0] - x[1]) == pytest.approx(slope, abs=1e-12)
        return abs(float(((x[2:] - x[1]) ** 2).sum()) - left)

    errors = [moments(n) for n in (80, 160, 320)]
    assert orders(errors) == pytest.approx([order] * 2, abs=0.15)
    assert errors[-1] < (1e-2 if order == 1 else 1e-4)


@pytest.mark.parametrize(
    "sampler",
    [DDIM(), DDIM(1.0), DDPM(), DDPM("large"), DPMSolverPP(), DPMSolverPPSDE(), Heun(), Heun(churn=3.0)],
)
@pytest.mark.parametrize("schedule", [*MORE_SCHEDULES, DiscreteSchedule("squaredcos_cap_v2")])
def test_a_perfect_denoiser_of_one_image_ends_at_it(schedule, sampler):
    image = torch.linspace(-1, 1, 12, dtype=torch.float64).view(1, 3, 2, 2)
    times = torch.linspace(1, 0, 8, dtype=torch.float64)
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = sampler(lambda x_t, t: image, x, times, schedule=schedule, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(result, image, rtol=0, atol=1e-12)


def check_moments(x, mean, variance):
    """Mean and variance of many samples, within four standard errors."""
    n = x.numel()
    assert float(x.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / n))
    assert float(x.var()) == pytest.approx(variance, abs=4 * variance * math.sqrt(2 / n))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("sampler", "spread"), [(DDPM("small"), 0.0), (DDIM(1.0), 0.0), (DDIM(0.5), 0.0), (DDPM("large"), 1.0)]
)
def test_each_variance_is_exact_for_the_data_it_is_right_for(schedule, sampler, spread):
    # Ho et al. 2020, section 3.2: "small" for one point, "large" for unit variance, in as few steps as one likes;
    # "large" is so where variance is preserved
    if spread == 1 and isinstance(schedule, FlowSchedule):
        pytest.skip("flow does not preserve variance")
    times = schedule.time_at(torch.tensor([-5.0, -1.0, 0.5, 3.0], dtype=torch.float64))
    for last in (2, 3, 4):
        alpha, sigma = levels(schedule, times[0])
        x = alpha * MEAN + math.sqrt(alpha**2 * spread**2 + sigma**2) * noise(100_000)
        generator = torch.Generator().manual_seed(last)
        denoise = gaussian_denoiser(schedule, MEAN, spread)
        x = sampler(denoise, x, times[:last], schedule=schedule, generator=generator)
        alpha, sigma = levels(schedule, times[last - 1])
        check_moments(x, alpha * MEAN, alpha**2 * spread**2 + sigma**2)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spread", [0.05, 0.5, 1.0])
def test_the_learned_variance_can_be_exact_for_any_gaussian(schedule, spread):
    # p(x_s | x_t) of Gaussian data has the posterior's variance and that of its mean through x0; v says where between
    times = schedule.time_at(torch.tensor([-5.0, -1.0, 0.5, 3.0], dtype=torch.float64))
    place = iter(times[1:])
    plain = gaussian_denoiser(schedule, MEAN, spread)

    def denoise(x, t):
        s = next(place)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = levels(schedule, t[0]), levels(schedule, s)
        large = sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2
        small = large * sigma_s**2 / sigma_t**2
        left = spread**2 * sigma_t**2 / (alpha_t**2 * spread**2 + sigma_t**2)
        variance = small + (alpha_s * large / sigma_t**2) ** 2 * left
        return Denoised(plain(x, t), torch.full_like(x, math.log(variance / small) / math.log(large / small)))

    alpha, sigma = levels(schedule, times[0])
    x = alpha * MEAN + math.sqrt(alpha**2 * spread**2 + sigma**2) * noise(100_000)
    x = DDPM("learned")(denoise, x, times, schedule=schedule, generator=torch.Generator().manual_seed(1))
    alpha, sigma = levels(schedule, times[-1])
    check_moments(x, alpha * MEAN, alpha**2 * spread**2 + sigma**2)


def test_learned_variance_between_the_fixed_ones():
    schedule, x = CosineSchedule(), noise(100)
    times = torch.linspace(1, 0, 6, dtype=torch.float64)
    plain = gaussian_denoiser(schedule)

    def draw(sampler, denoise):
        return sampler(denoise, x, times, schedule=schedule, generator=torch.Generator().manual_seed(1))

    for v, fixed in ((0.0, "small"), (1.0, "large")):
        learned = draw(DDPM("learned"), lambda x, t, v=v: Denoised(plain(x, t), torch.full_like(x, v)))
        assert torch.allclose(learned, draw(DDPM(fixed), plain), rtol=0, atol=1e-12)
    assert DDPM("learned").needs_variance
    assert not DDPM("small").needs_variance
    with pytest.raises(InputError, match="gives Denoised"):
        draw(DDPM("learned"), plain)


def edm_by_hand(denoise, x, sigmas, churn, low, high, noise_scale, draws):
    """Karras et al. 2022, algorithm 2, as written, with D(x, sigma)."""
    x = x * sigmas[0]
    for i in range(len(sigmas) - 1):
        gamma = min(churn / (len(sigmas) - 1), math.sqrt(2) - 1) if low <= sigmas[i] <= high else 0
        sigma_hat = sigmas[i] * (1 + gamma)
        if gamma > 0:
            x = x + math.sqrt(sigma_hat**2 - sigmas[i] ** 2) * noise_scale * next(draws)
        d = (x - denoise(x, sigma_hat)) / sigma_hat
        following = x + (sigmas[i + 1] - sigma_hat) * d
        if sigmas[i + 1] != 0:
            d_there = (following - denoise(following, sigmas[i + 1])) / sigmas[i + 1]
            following = x + (sigmas[i + 1] - sigma_hat) * (d + d_there) / 2
        x = following
    return x


@pytest.mark.parametrize("schedule", [*MORE_SCHEDULES, DiscreteSchedule()])
@pytest.mark.parametrize("churn", [{}, {"churn": 4.0}, {"churn": 100.0, "churn_min": 0.3, "churn_max": 9.0}])
def test_heun_is_edms_algorithm(schedule, churn):
    sigmas = [50.0, 20.0, 8.0, 3.0, 1.0, 0.4, 0.1, 0.0]
    times = schedule.time_at(-2 * torch.tensor(sigmas, dtype=torch.float64).log().clamp(min=-50))
    times[-1] = 0
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = [torch.randn(x.shape, dtype=torch.float64, generator=g) for g in [torch.Generator().manual_seed(1)] * 7]

    def by_sigma(x, sigma):
        return torch.tanh(x + math.log(sigma))

    def denoise(x_t, t):
        alpha, sigma = levels(schedule, t[0])
        return by_sigma(x_t / alpha, sigma / alpha)

    settings = {"churn": 0.0, "churn_min": 0.0, "churn_max": math.inf, **churn}
    theirs = edm_by_hand(
        by_sigma, x, sigmas, settings["churn"], settings["churn_min"], settings["churn_max"], 1.003, iter(drawn)
    )
    sampler = Heun(**churn, noise_scale=1.003)
    begin = x * sigmas[0] * levels(schedule, times[0])[0]
    ours = sampler(denoise, begin, times, schedule=schedule, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
    if churn:
        assert (ours - Heun()(denoise, begin, times, schedule=schedule)).abs().max() > 1e-3


def test_churn_does_not_go_beyond_the_schedule():
    schedule, seen = LinearSchedule(), []

    def denoise(x, t):
        seen.append(float(t[0]))
        return gaussian_denoiser(schedule)(x, t)

    times = torch.linspace(1, 0, 5, dtype=torch.float64)
    Heun(churn=100.0)(denoise, noise(2), times, schedule=schedule, generator=torch.Generator())
    assert seen[0] == 1
    assert max(seen) == 1
    assert seen[2] > float(times[1])


@pytest.mark.parametrize(
    ("sampler", "num_steps"),
    [(DDPM("small"), 300), (DDPM("large"), 300), (DDIM(1.0), 300), (DPMSolverPPSDE(), 100), (Heun(churn=40.0), 100)],
)
def test_stochastic_samplers_draw_from_a_mixture(sampler, num_steps):
    mixture, schedule, count = Mixture(), CosineSchedule(), 4000

    def denoise(x, t):
        return torch.from_numpy(mixture.denoise(x.numpy(), *levels(schedule, t[0])))

    times = torch.cat([even_times(schedule, num_steps - 1, -9.0, 9.0), torch.zeros(1, dtype=torch.float64)])
    x = sampler(denoise, noise(count), times, schedule=schedule, generator=torch.Generator().manual_seed(1))

    def cdf(value):
        return sum(w * stats.norm(c, mixture.spread).cdf(value) for w, c in zip(mixture.weights, mixture.centres))

    # 1.63 / sqrt(count) is the distance that one in a hundred exact samples exceeds; half as much again for the steps
    assert stats.kstest(x.flatten().numpy(), cdf).statistic < 1.5 * 1.63 / math.sqrt(count)


@pytest.mark.parametrize(
    "sampler", [DDPM("small"), DDPM("large"), DDIM(1.0), DPMSolverPPSDE(), Heun(), Heun(churn=40.0)]
)
def test_many_small_steps_draw_the_data(sampler):
    schedule = CosineSchedule()
    times = torch.linspace(1, 0, 301, dtype=torch.float64)
    x = sampler(
        gaussian_denoiser(schedule), noise(20_000), times, schedule=schedule, generator=torch.Generator().manual_seed(1)
    )
    assert float(x.mean()) == pytest.approx(MEAN, abs=4 * SPREAD / math.sqrt(20_000))
    # four standard errors, and 1% for the steps
    assert float(x.var()) == pytest.approx(SPREAD**2, rel=4 * math.sqrt(2 / 20_000) + 0.01)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 2, 10])
def test_ddim_with_eta_1_is_ddpm(schedule, num_steps):
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    paths = []
    for sampler in (DDIM(1.0), DDPM("small")):
        path = []

        def denoise(x_t, t, path=path):
            path.append(x_t)
            return torch.tanh(x_t + t.view(-1, 1, 1, 1))

        generator = torch.Generator().manual_seed(3)
        path.append(sampler(denoise, x, times, schedule=schedule, generator=generator))
        paths.append(torch.stack(path))
    assert len(paths[0]) == num_steps + 1
    assert torch.allclose(*paths, rtol=0, atol=1e-10)


def test_times_beyond_the_last_log_snr_are_one():
    # two times at which the cosine's log-SNR is held at -20
    schedule = ShiftedCosineSchedule(1024)
    times = torch.tensor([1.0, 1 - 1e-6, 0.9, 0.5, 0.1], dtype=torch.float64)
    assert schedule.log_snr(times[0]) == schedule.log_snr(times[1])
    x = noise(3)
    for sampler in (DDIM(), DPMSolverPP(), Heun()):
        result = sampler(gaussian_denoiser(schedule), x, times, schedule=schedule)
        without = sampler(gaussian_denoiser(schedule), x, times[1:], schedule=schedule)
        assert torch.allclose(result, without, rtol=0, atol=1e-12)
