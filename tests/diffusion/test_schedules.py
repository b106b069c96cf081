import math

import pytest
import torch
from diffusers import DDPMScheduler

from imagen_lightning.diffusion import (
    CosineSchedule,
    DiscreteSchedule,
    FlowSchedule,
    LinearSchedule,
    ShiftedCosineSchedule,
    SigmoidSchedule,
)
from imagen_lightning.diffusion.schedules import LOG_SNR_MIN
from imagen_lightning.types import InputError

SCHEDULES = [
    CosineSchedule(),
    ShiftedCosineSchedule(256),
    ShiftedCosineSchedule(16),
    ShiftedCosineSchedule(32, reference_size=256),
    FlowSchedule(),
    SigmoidSchedule(),
    SigmoidSchedule(0.0, 3.0, 0.7),
    LinearSchedule(),
    DiscreteSchedule(),
    DiscreteSchedule("squaredcos_cap_v2"),
    DiscreteSchedule([0.1, 0.05, 0.3, 0.2, 0.9], num_steps=5),
]
FLOW = SCHEDULES[4]
HELD = SCHEDULES[:7]  # those that would end at a log-SNR of -inf
INNER = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
WHOLE = torch.linspace(0, 1, 1001, dtype=torch.float64)


@pytest.mark.parametrize("schedule", [schedule for schedule in SCHEDULES if schedule is not FLOW])
def test_all_but_flow_preserve_variance(schedule):
    total = schedule.alpha(WHOLE) ** 2 + schedule.sigma(WHOLE) ** 2
    assert torch.allclose(total, torch.ones(1001).double(), rtol=0, atol=1e-15)


def test_cosine_is_the_textbook_cosine():
    schedule = CosineSchedule()
    for t in (0.0, 0.1, 0.5, 0.77, 0.999):
        exact = torch.tensor(t, dtype=torch.float64)
        assert float(schedule.alpha(exact)) == pytest.approx(math.cos(math.pi * t / 2), abs=1e-15)
        assert float(schedule.sigma(exact)) == pytest.approx(math.sin(math.pi * t / 2), abs=1e-15)


def test_flow_is_the_straight_line():
    assert torch.equal(FlowSchedule().alpha(INNER), 1 - INNER)
    assert torch.equal(FlowSchedule().sigma(WHOLE), WHOLE)


@pytest.mark.parametrize(("image_size", "reference_size"), [(256, 64), (16, 64), (1024, 64), (64, 64), (32, 256)])
def test_shift_moves_the_log_snr_by_the_ratio_of_sizes(image_size, reference_size):
    shifted = ShiftedCosineSchedule(image_size, reference_size).log_snr(INNER)
    expected = CosineSchedule().log_snr(INNER) + 2 * math.log(reference_size / image_size)
    inside = expected > LOG_SNR_MIN
    assert inside.sum() > 990
    assert torch.allclose(shifted[inside], expected[inside], rtol=0, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_log_snr_is_that_of_alpha_and_sigma_and_falls(schedule):
    expected = torch.log(schedule.alpha(INNER) ** 2 / schedule.sigma(INNER) ** 2)
    assert torch.allclose(schedule.log_snr(INNER), expected, rtol=0, atol=1e-9)
    assert (schedule.log_snr(INNER).diff() < 0).all()
    assert (schedule.alpha(WHOLE).diff() <= 0).all()
    assert (schedule.sigma(WHOLE).diff() >= 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_time_at_inverts_log_snr(schedule):
    assert torch.allclose(schedule.time_at(schedule.log_snr(INNER)), INNER, rtol=0, atol=1e-12)
    end = float(schedule.log_snr(torch.ones((), dtype=torch.float64)))
    levels = torch.linspace(max(-15, end), 15, 61, dtype=torch.float64)
    assert torch.allclose(schedule.log_snr(schedule.time_at(levels)), levels, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ends(schedule, dtype):
    data, noise = torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)
    assert schedule.alpha(data) == 1
    assert schedule.sigma(data) == 0
    assert schedule.log_snr(data) == math.inf
    assert schedule.alpha(noise) > 0
    if schedule in HELD:
        assert float(schedule.sigma(noise)) == pytest.approx(1, abs=1e-8)
        # float32 knows an angle near pi / 2 to 1e-7, hence alpha = 4.5e-5 to a part in a thousand
        tolerance = 1e-6 if dtype == torch.float64 else 5e-3
        assert float(schedule.log_snr(noise)) == pytest.approx(LOG_SNR_MIN, abs=tolerance)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_float32_is_float64_rounded(schedule):
    t = torch.linspace(0, 0.99, 298, dtype=torch.float64)
    for value in (schedule.alpha, schedule.sigma, schedule.log_snr):
        assert torch.allclose(value(t.float()).double(), value(t.float().double()), rtol=2e-5, atol=2e-6)


def test_network_time():
    for schedule in SCHEDULES:
        if not isinstance(schedule, DiscreteSchedule):
            assert torch.equal(schedule.network_time(WHOLE), 1000 * WHOLE)
            assert torch.equal(schedule.training_time(WHOLE), WHOLE)


def test_linear_is_the_integral_of_its_beta():
    # Song et al. 2021, eq. 33: alpha^2 = exp(-integral of beta)
    schedule, t = LinearSchedule(0.3, 7.0), torch.linspace(0, 0.8, 100_001, dtype=torch.float64)
    integral = torch.trapezoid(0.3 + (7.0 - 0.3) * t, t)
    assert float(schedule.alpha(t[-1])) == pytest.approx(math.exp(-float(integral) / 2), rel=1e-10)
    assert float(LinearSchedule().log_snr(torch.ones(1))) == pytest.approx(-10.05, abs=1e-3)


def test_linear_is_the_limit_of_ddpms_table():
    distances = []
    for num_steps in (1000, 10_000):
        table = DiscreteSchedule("linear", num_steps, 0.1 / num_steps, 20 / num_steps)
        distances.append((LinearSchedule().log_snr(INNER) - table.log_snr(INNER)).abs().max())
    assert distances[0] < 0.1
    assert distances[1] < distances[0] / 8


@pytest.mark.parametrize(("start", "end", "tau"), [(-3.0, 3.0, 1.0), (0.0, 3.0, 0.7), (-2.0, 4.0, 0.3)])
def test_sigmoid_is_the_papers(start, end, tau):
    # Chen 2023, algorithm 1
    sigmoid = lambda x: torch.sigmoid(torch.as_tensor(x / tau, dtype=torch.float64))  # noqa: E731
    expected = (sigmoid(end) - sigmoid(start + WHOLE * (end - start))) / (sigmoid(end) - sigmoid(start))
    alpha2 = SigmoidSchedule(start, end, tau).alpha(WHOLE) ** 2
    assert torch.allclose(alpha2, expected, rtol=0, atol=3e-9)  # where it is held
    assert torch.allclose(alpha2[:-1], expected[:-1], rtol=1e-7, atol=0)


# ---- tables

K = torch.arange(1000)


@pytest.mark.parametrize("betas", ["linear", "squaredcos_cap_v2"])
def test_tables_are_those_of_diffusers(betas):
    theirs = DDPMScheduler(beta_schedule=betas)
    # diffusers multiplies a thousand float32 numbers
    assert torch.allclose(DiscreteSchedule(betas).alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-4, atol=0)
    assert torch.allclose(DiscreteSchedule(theirs.betas.tolist()).alphas_cumprod, theirs.alphas_cumprod.double(), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_steps", [1000, 250, 4000])
@pytest.mark.parametrize("betas", ["linear", "squaredcos_cap_v2"])
def test_a_table_is_exact_at_its_steps(betas, num_steps, dtype):
    schedule, k = DiscreteSchedule(betas, num_steps), torch.arange(num_steps)
    t = (k + 1).to(dtype) / num_steps
    assert torch.equal(schedule.network_time(t), k.to(dtype))
    assert torch.equal(schedule.alpha(t), schedule.alphas_cumprod.to(dtype).sqrt())
    assert torch.equal(schedule.sigma(t), (1 - schedule.alphas_cumprod).to(dtype).sqrt())
    assert torch.equal(schedule.training_time(t), t)


def test_between_steps_log_alpha_is_linear():
    schedule = DiscreteSchedule()
    t = (K[:-1].double() + 1.25) / 1000
    ends = [schedule.alpha((K.double() + 1) / 1000).log()[part] for part in (slice(0, -1), slice(1, None))]
    assert torch.allclose(schedule.alpha(t).log(), 0.75 * ends[0] + 0.25 * ends[1], rtol=1e-12, atol=0)
    assert torch.allclose(schedule.network_time(t), K[:-1].double() + 0.25)


def test_training_times_are_steps_and_each_is_drawn_alike():
    schedule = DiscreteSchedule()
    draws = (torch.arange(20_000) + 0.5) / 20_000
    steps = schedule.network_time(schedule.training_time(draws))
    assert torch.equal(steps, steps.round())
    assert torch.equal(torch.bincount(steps.long(), minlength=1000), torch.full((1000,), 20))
    assert torch.equal(schedule.training_time(torch.tensor([1e-7, 1.0])), torch.tensor([0.001, 1.0]))


def test_tables_that_cannot_be():
    for arguments, message in [
        ({"betas": "cosine"}, "'cosine' are unknown"),
        ({"betas": [0.1, 0.2]}, r"num_steps = 1000 .* got 2"),
        ({"betas": [0.1, 1.0], "num_steps": 2}, "from 0.1 to 1"),
        ({"beta_end": 1.5}, "to 1.5"),
        ({"num_steps": 0}, "num_steps 0"),
    ]:
        with pytest.raises(InputError, match=message):
            DiscreteSchedule(**arguments)


def test_arguments_that_cannot_be():
    with pytest.raises(InputError, match="beta_min 0"):
        LinearSchedule(0.0)
    with pytest.raises(InputError, match=r"beta_min 3.* beta_max 2"):
        LinearSchedule(3.0, 2.0)
    for arguments in ((3.0, -3.0), (-3.0, 3.0, 0.0), (-3.0, 3.0, 0.01)):
        with pytest.raises(InputError, match="sigmoid schedule"):
            SigmoidSchedule(*arguments)


def test_sizes_must_be_positive():
    with pytest.raises(InputError, match="image_size 0"):
        ShiftedCosineSchedule(0)
    with pytest.raises(InputError, match="reference_size -64"):
        ShiftedCosineSchedule(64, -64)
