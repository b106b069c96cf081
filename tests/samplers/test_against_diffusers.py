"""Samplers against diffusers' schedulers, and against the values its own tests publish."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from discrete_table import DiscreteTable, times_of

from imagen_lightning.diffusion import DiffusionProcess, Epsilon, Plain, StaticThresholding, V, threshold
from imagen_lightning.samplers import DDIM, DDPM, DPMSolverPP

BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
PREDICTIONS = {"epsilon": Epsilon(), "v_prediction": V()}
PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "reference" / "diffusers_scheduler_expected.json"


def network(x, k):
    return torch.tanh(0.7 * x + torch.sin(k.double() / 100))


def start():
    return torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def denoiser(table, parametrization, model, clip):
    process = DiffusionProcess(table, parametrization, Plain())

    def denoise(x_t, t):
        return process.x0(model(x_t, table.network_time(t).view(-1, 1, 1, 1)), x_t, t)

    return threshold(denoise, StaticThresholding()) if clip else denoise


def walk(sampler, denoise, x, times, table, generator=None):
    """The x after each step."""
    path = []

    def watched(x_t, t):
        path.append(x_t)
        return denoise(x_t, t)

    last = sampler(watched, x, times, schedule=table, generator=generator)
    return torch.stack([*path[1:], last])


def walk_diffusers(scheduler, x, **options):
    path = []
    for k in scheduler.timesteps:
        x = scheduler.step(network(x, k), k, x, **options).prev_sample
        path.append(x)
    return torch.stack(path)


def in_float64(scheduler, table):
    """Lets a scheduler compute with the table in float64, as the samplers do."""
    scheduler.alphas_cumprod = table.alphas_cumprod
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    return scheduler


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_step_by_step(prediction, clip, eta):
    table = DiscreteTable()
    scheduler = in_float64(DDIMScheduler(**BETAS, prediction_type=prediction, clip_sample=clip), table)
    scheduler.set_timesteps(20)
    theirs = walk_diffusers(
        scheduler, start(), eta=eta, use_clipped_model_output=True, generator=torch.Generator().manual_seed(1)
    )
    denoise = denoiser(table, PREDICTIONS[prediction], network, clip)
    times = times_of(scheduler.timesteps.tolist())
    ours = walk(DDIM(eta), denoise, start(), times, table, torch.Generator().manual_seed(1))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_step_by_step(prediction, clip, variance):
    table = DiscreteTable()
    scheduler = in_float64(
        DDPMScheduler(**BETAS, prediction_type=prediction, clip_sample=clip, variance_type=f"fixed_{variance}"), table
    )
    scheduler.set_timesteps(20)
    theirs = walk_diffusers(scheduler, start(), generator=torch.Generator().manual_seed(1))
    denoise = denoiser(table, PREDICTIONS[prediction], network, clip)
    times = times_of(scheduler.timesteps.tolist())
    ours = walk(DDPM(variance), denoise, start(), times, table, torch.Generator().manual_seed(1))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_dpm_solver_step_by_step(prediction, final):
    table = DiscreteTable()
    scheduler = DPMSolverMultistepScheduler(
        **BETAS, prediction_type=prediction, final_sigmas_type=final, lower_order_final=False, solver_order=2
    )
    scheduler.set_timesteps(20)
    theirs = walk_diffusers(scheduler, start())
    denoise = denoiser(table, PREDICTIONS[prediction], network, clip=False)
    times = times_of(scheduler.timesteps.tolist(), last=0.0 if final == "zero" else 1 / 1000)
    ours = walk(DPMSolverPP(), denoise, start(), times, table)
    assert len(ours) == 20
    # diffusers holds sigma in float32; x0 of the first steps is some hundred times x
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


# ---- the published values: a "network" x t / (t + 1) from a fixed image


@pytest.fixture(scope="module")
def published():
    if not PUBLISHED.exists():
        pytest.skip(f"no published values: {PUBLISHED.name} lies in no shared folder beside the repository")
    return {case["name"]: case for case in json.loads(PUBLISHED.read_text())["cases"]}


def dummy(x, k):
    return x * k / (k + 1)


def dummy_image():
    return (torch.arange(768).float().reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2)


def check(x, case):
    assert float(x.abs().mean()) == pytest.approx(case["mean"], abs=1e-3)
    if "sum" in case:
        assert float(x.abs().sum()) == pytest.approx(case["sum"], abs=1e-2)


LEADING = range(900, -1, -100)


@pytest.mark.parametrize(
    ("name", "prediction", "beta_start", "steps", "last", "clip"),
    [
        ("ddim_eps_eta0_10steps_clip", "epsilon", 1e-4, LEADING, 0.0, True),
        ("ddim_v_eta0_10steps_clip", "v_prediction", 1e-4, LEADING, 0.0, True),
        ("ddim_eps_beta_start0.01_alpha_to_one", "epsilon", 0.01, LEADING, 0.0, True),
        # not to one: the step below the table's first is that first, so that the last step changes nothing
        ("ddim_eps_beta_start0.01_not_alpha_to_one", "epsilon", 0.01, LEADING[:-1], 1 / 1000, True),
    ],
)
def test_published_ddim(published, name, prediction, beta_start, steps, last, clip):
    table = DiscreteTable(beta_start)
    denoise = denoiser(table, PREDICTIONS[prediction], dummy, clip)
    check(DDIM()(denoise, dummy_image(), times_of(steps, last), schedule=table), published[name])


@pytest.mark.parametrize(
    ("name", "prediction"),
    [
        ("dpmsolver++_2M_midpoint_eps_10steps_linspace_final_sigma_min", "epsilon"),
        ("dpmsolver++_2M_midpoint_v_10steps", "v_prediction"),
    ],
)
def test_published_dpm_solver(published, name, prediction):
    table = DiscreteTable()
    steps = torch.linspace(0, 999, 11).round().flip(0)[:-1].tolist()
    denoise = denoiser(table, PREDICTIONS[prediction], dummy, clip=False)
    check(DPMSolverPP()(denoise, dummy_image(), times_of(steps, 1 / 1000), schedule=table), published[name])


@pytest.mark.parametrize(
    ("name", "prediction"),
    [
        ("ddpm_eps_1000steps_fixed_small_torch.manual_seed(0)", "epsilon"),
        ("ddpm_v_1000steps_torch.manual_seed(0)", "v_prediction"),
    ],
)
def test_published_ddpm(published, name, prediction):
    table = DiscreteTable()
    denoise = denoiser(table, PREDICTIONS[prediction], dummy, clip=True)
    generator = torch.Generator().manual_seed(0)
    x = DDPM()(denoise, dummy_image(), times_of(range(999, -1, -1)), schedule=table, generator=generator)
    check(x, published[name])


def variance_of_a_step(sampler, table, k, last):
    """The variance of the noise that one step adds, from what it makes of zeros."""
    x = torch.zeros(1, 1, 1, 1000, dtype=torch.float64)
    generator, again = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    noise = torch.randn(x.shape, dtype=torch.float64, generator=again)
    result = sampler(lambda x_t, t: x_t, x, times_of([k], last), schedule=table, generator=generator)
    return float((result / noise).mean()) ** 2


def test_published_variances(published):
    table = DiscreteTable()
    case = published["ddpm_posterior_variance_fixed_small"]
    for k, variance in zip(case["t"], case["var"]):
        assert variance_of_a_step(DDPM(), table, k, k / 1000) == pytest.approx(variance, abs=case["tol"])
    case = published["ddim_variance(t,prev)"]
    for (k, previous), variance in zip(case["pairs"], case["var"]):
        assert variance_of_a_step(DDIM(1.0), table, k, (previous + 1) / 1000) == pytest.approx(variance, abs=1e-5)
