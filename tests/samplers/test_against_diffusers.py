"""Samplers against diffusers' schedulers, and against the values its own tests publish."""

import json

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    HeunDiscreteScheduler,
)
from diffusers.pipelines.deepfloyd_if import timesteps as deepfloyd
from discrete_table import times_of
from given_data import given

from imagen_lightning.diffusion import (
    DiffusionProcess,
    DiscreteSchedule,
    Epsilon,
    LearnedRange,
    Plain,
    StaticThresholding,
    V,
    threshold,
)
from imagen_lightning.samplers import (
    DDIM,
    DDPM,
    DPMSolverPP,
    DPMSolverPPSDE,
    Heun,
    KarrasTimes,
    LeadingTimes,
    LinspaceTimes,
    ListedTimes,
    TrailingTimes,
)
from imagen_lightning.samplers.step_lists import PUBLISHED as LISTS
from imagen_lightning.types import Schedule

BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
PREDICTIONS = {"epsilon": Epsilon(), "v_prediction": V()}


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
    table = DiscreteSchedule()
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
    table = DiscreteSchedule()
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
    table = DiscreteSchedule()
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


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("betas", ["linear", "squaredcos_cap_v2"])
def test_ddpm_with_learned_variance_step_by_step(prediction, clip, betas):
    table = DiscreteSchedule(betas)
    settings = {**BETAS, "beta_schedule": betas, "prediction_type": prediction, "clip_sample": clip}
    scheduler = in_float64(DDPMScheduler(**settings, variance_type="learned_range"), table)
    scheduler.set_timesteps(20)

    def learned(x, k):
        return torch.cat([network(x, k), torch.sin(3 * x)], dim=1)

    x, theirs, generator = start(), [], torch.Generator().manual_seed(1)
    for k in scheduler.timesteps:
        x = scheduler.step(learned(x, k), k, x, generator=generator).prev_sample
        theirs.append(x)
    process = DiffusionProcess(table, PREDICTIONS[prediction], Plain(), variance=LearnedRange())

    def denoise(x_t, t):
        return process.denoised(learned(x_t, table.network_time(t).view(-1, 1, 1, 1)), x_t, t)

    denoise = threshold(denoise, StaticThresholding()) if clip else denoise
    times = LeadingTimes()(20, table)
    ours = walk(DDPM("learned"), denoise, start(), times, table, torch.Generator().manual_seed(1))
    # x0 from epsilon divides by alpha: what differs in the last digit grows with the image
    assert torch.allclose(ours, torch.stack(theirs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("betas", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("num_steps", [20, 10])
def test_dpm_solver_sde_step_by_step(prediction, betas, num_steps):
    table = DiscreteSchedule(betas)
    scheduler = DPMSolverMultistepScheduler(
        **{**BETAS, "beta_schedule": betas}, prediction_type=prediction, algorithm_type="sde-dpmsolver++",
        lambda_min_clipped=-5.1,
    )  # fmt: skip
    scheduler.set_timesteps(num_steps)
    noise = torch.randn(num_steps, *start().shape, generator=torch.Generator().manual_seed(2))
    x, theirs = start(), []
    for k, draw in zip(scheduler.timesteps, noise):
        x = scheduler.step(network(x, k), k, x, variance_noise=draw).prev_sample
        theirs.append(x)
    denoise = denoiser(table, PREDICTIONS[prediction], network, clip=False)
    times = LinspaceTimes(lambda_min=-5.1)(num_steps, table)
    with pytest.MonkeyPatch.context() as patch:
        draws = iter(noise)
        patch.setattr("imagen_lightning.samplers.dpmpp.noise_like", lambda x, generator: next(draws))
        ours = walk(DPMSolverPPSDE(), denoise, start(), times, table)
    assert torch.allclose(ours, torch.stack(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [14, 15])
@pytest.mark.parametrize(
    ("sampler", "kind"), [(DPMSolverPP(15), "dpmsolver++"), (DPMSolverPPSDE(15), "sde-dpmsolver++")]
)
def test_lower_order_at_the_end_of_few_steps(num_steps, sampler, kind):
    table = DiscreteSchedule()
    scheduler = DPMSolverMultistepScheduler(**BETAS, algorithm_type=kind, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(num_steps)
    zeros = torch.zeros(start().shape)
    options = {"variance_noise": zeros} if kind.startswith("sde") else {}
    theirs = walk_diffusers(scheduler, start(), **options)
    denoise = denoiser(table, Epsilon(), network, clip=False)
    times = LinspaceTimes()(num_steps, table)
    times[-1] = 1 / 1000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("imagen_lightning.samplers.dpmpp.noise_like", lambda x, generator: zeros)
        ours = walk(sampler, denoise, start(), times, table)
        other = walk(type(sampler)(), denoise, start(), times, table)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert torch.allclose(ours[:-1], other[:-1])
    assert torch.allclose(ours[-1], other[-1], rtol=1e-5) == (num_steps == 15)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("betas", ["linear", "squaredcos_cap_v2"])
def test_heun_step_by_step(prediction, betas):
    table = DiscreteSchedule(betas)
    settings = {**BETAS, "beta_schedule": betas, "prediction_type": prediction}
    scheduler = in_float64(HeunDiscreteScheduler(**settings), table)
    scheduler.set_timesteps(28)  # 999 / 27 is a whole number
    times = times_of(torch.linspace(999, 0, 28, dtype=torch.float64).tolist())
    sigmas = table.sigma(times) / table.alpha(times)
    assert torch.allclose(scheduler.sigmas[1:-1:2].double(), sigmas[1:-1], rtol=1e-6)
    # in float64: Heun's first step from sigma = 20,000 multiplies what float32 leaves off
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    alphas = torch.rsqrt(1 + scheduler.sigmas**2)
    y, theirs = start() / alphas[0], []
    for i, k in enumerate(scheduler.timesteps):
        x = scheduler.scale_model_input(y, k)
        y = scheduler.step(network(x, k), k, y).prev_sample
        theirs.append(y * alphas[i + 1])
    ours = walk(Heun(), denoiser(table, PREDICTIONS[prediction], network, clip=False), start(), times, table)
    assert len(ours) == len(theirs) == 55
    assert torch.allclose(ours, torch.stack(theirs), rtol=1e-9, atol=1e-9)


class VarianceExploding(Schedule):
    """EDM's: alpha = 1, sigma = 100 t."""

    def alpha(self, t):
        return torch.ones_like(t)

    def sigma(self, t):
        return 100 * t

    def log_snr(self, t):
        return -2 * torch.log(self.sigma(t))

    def time_at(self, log_snr):
        return torch.exp(-log_snr / 2) / 100

    def network_time(self, t):
        return torch.log(self.sigma(t)) / 4  # c_noise of Karras et al. 2022, table 1


def preconditioned(model, spread=0.5):
    """D of Karras et al. 2022, eq. 7, as diffusers has it for an epsilon model."""
    schedule = VarianceExploding()

    def denoise(x_t, t):
        sigma = schedule.sigma(t).view(-1, 1, 1, 1)
        output = model(x_t / (sigma**2 + spread**2).sqrt(), schedule.network_time(t).view(-1, 1, 1, 1))
        total = sigma**2 + spread**2
        return spread**2 / total * x_t + sigma * spread / total.sqrt() * output

    return denoise


def test_ddim_is_edms_euler_step_by_step():
    schedule, scheduler = VarianceExploding(), EDMEulerScheduler()
    scheduler.set_timesteps(20)
    begin = start() * scheduler.init_noise_sigma
    x, theirs = begin, []
    for k in scheduler.timesteps:
        given = scheduler.scale_model_input(x, k)
        x = scheduler.step(network(given, k.double()).float(), k, x).prev_sample.double()
        theirs.append(x)
    times = KarrasTimes()(20, schedule)
    assert torch.allclose(schedule.sigma(times), scheduler.sigmas.double(), rtol=1e-6, atol=0)
    ours = walk(DDIM(), preconditioned(network), begin, times, schedule)
    assert torch.allclose(ours, torch.stack(theirs), rtol=1e-4, atol=1e-4)


# ---- spacings


def steps_of(times, table):
    assert times[-1] == 0
    return table.network_time(times[:-1]).tolist()


@pytest.mark.parametrize("num_steps", [1, 7, 27, 50, 100, 999, 1000])
def test_leading_and_trailing_times(num_steps):
    table = DiscreteSchedule()
    for spacing, name in ((LeadingTimes(), "leading"), (TrailingTimes(), "trailing")):
        scheduler = DDPMScheduler(timestep_spacing=name)
        scheduler.set_timesteps(num_steps)
        assert steps_of(spacing(num_steps, table), table) == scheduler.timesteps.tolist()
    if num_steps < 1000:
        scheduler = DDPMScheduler(timestep_spacing="leading", steps_offset=1)
        scheduler.set_timesteps(num_steps)
        assert steps_of(LeadingTimes(offset=1)(num_steps, table), table) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("betas", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("lambda_min", [None, -5.1, -3.0])
@pytest.mark.parametrize("num_steps", [1, 10, 25, 50, 333])
def test_linspace_times_and_lambda_clipping(betas, lambda_min, num_steps):
    table = DiscreteSchedule(betas)
    options = {} if lambda_min is None else {"lambda_min_clipped": lambda_min}
    scheduler = DPMSolverMultistepScheduler(beta_schedule=betas, **options)
    scheduler.set_timesteps(num_steps)
    times = LinspaceTimes(lambda_min)(num_steps, table)
    assert steps_of(times, table) == scheduler.timesteps.tolist()
    if lambda_min is not None:
        assert table.log_snr(times[0]) / 2 >= lambda_min


@pytest.mark.parametrize("betas", ["linear", "squaredcos_cap_v2"])
def test_karras_times(betas):
    table = DiscreteSchedule(betas)
    scheduler = DPMSolverMultistepScheduler(beta_schedule=betas, use_karras_sigmas=True)
    scheduler.set_timesteps(20)
    sigmas = scheduler.sigmas[:-1].double()
    times = KarrasTimes(float(sigmas[-1]) * (1 + 1e-6), float(sigmas[0]) * (1 - 1e-4))(20, table)
    assert torch.allclose(table.sigma(times[:-1]) / table.alpha(times[:-1]), sigmas, rtol=1e-3)
    # between two steps diffusers interpolates log(sigma / alpha), the table here log(alpha): a step apart at most
    assert (table.network_time(times[:-1]) - scheduler.timesteps).abs().max() < 1.01


def test_deepfloyds_lists():
    table = DiscreteSchedule("squaredcos_cap_v2")
    assert len(LISTS) == 8
    for name, steps in LISTS.items():
        assert steps == getattr(deepfloyd, f"{name}_timesteps")
        assert steps_of(ListedTimes(name)(len(steps), table), table) == steps


# ---- the published values: a "network" x t / (t + 1) from a fixed image


@pytest.fixture(scope="module")
def published():
    path = given("reference", "diffusers_scheduler_expected.json")
    return {case["name"]: case for case in json.loads(path.read_text())["cases"]}


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
    table = DiscreteSchedule(beta_start=beta_start)
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
    table = DiscreteSchedule()
    steps = torch.linspace(0, 999, 11).round().flip(0)[:-1].tolist()
    denoise = denoiser(table, PREDICTIONS[prediction], dummy, clip=False)
    check(DPMSolverPP()(denoise, dummy_image(), times_of(steps, 1 / 1000), schedule=table), published[name])


def test_published_dpm_solver_on_karras_times(published):
    table = DiscreteSchedule()
    first, last = (float((1 / table.alphas_cumprod[k] - 1).sqrt()) for k in (-1, 0))
    times = KarrasTimes(last, first)(10, table)
    times[-1] = 1 / 1000 - 1e-9  # a last step of no length: diffusers ends at its table's first step

    def rounded(x, k):  # diffusers tells the network whole steps
        return dummy(x, k.round())

    denoise = denoiser(table, V(), rounded, clip=False)
    check(DPMSolverPP()(denoise, dummy_image(), times, schedule=table), published["dpmsolver++_2M_v_karras"])


def test_published_edm_euler(published):
    schedule = VarianceExploding()
    x = dummy_image() * (80.0**2 + 1) ** 0.5
    result = DDIM()(preconditioned(dummy), x, KarrasTimes()(10, schedule), schedule=schedule)
    (name,) = (name for name in published if name.startswith("edm_euler"))
    check(result, published[name])


@pytest.mark.parametrize(
    ("name", "prediction"),
    [
        ("ddpm_eps_1000steps_fixed_small_torch.manual_seed(0)", "epsilon"),
        ("ddpm_v_1000steps_torch.manual_seed(0)", "v_prediction"),
    ],
)
def test_published_ddpm(published, name, prediction):
    table = DiscreteSchedule()
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
    table = DiscreteSchedule()
    case = published["ddpm_posterior_variance_fixed_small"]
    for k, variance in zip(case["t"], case["var"]):
        assert variance_of_a_step(DDPM(), table, k, k / 1000) == pytest.approx(variance, abs=case["tol"])
    case = published["ddim_variance(t,prev)"]
    for (k, previous), variance in zip(case["pairs"], case["var"]):
        assert variance_of_a_step(DDIM(1.0), table, k, (previous + 1) / 1000) == pytest.approx(variance, abs=1e-5)
