import pytest
import torch

from imagen_lightning.diffusion import (
    X0,
    CosineSchedule,
    DiffusionProcess,
    DiscreteSchedule,
    Epsilon,
    Flow,
    FlowSchedule,
    LinearSchedule,
    LowResAugmentation,
    Plain,
    ShiftedCosineSchedule,
    SigmoidSchedule,
    V,
)
from imagen_lightning.types import InputError

SCHEDULES = [
    CosineSchedule(),
    ShiftedCosineSchedule(256),
    FlowSchedule(),
    LinearSchedule(),
    SigmoidSchedule(),
    DiscreteSchedule("squaredcos_cap_v2"),
]
PARAMETRIZATIONS = [Epsilon(), X0(), V(), Flow()]
TIMES = torch.tensor([0.0, 1e-4, 0.1, 0.5, 0.9, 0.999, 1.0], dtype=torch.float64)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(len(TIMES), 3, 4, 4, dtype=torch.float64, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_the_target_gives_x0_back(schedule, parametrization, images):
    x0, epsilon = images
    process = DiffusionProcess(schedule, parametrization, Plain())
    x_t = process.add_noise(x0, epsilon, TIMES)
    alpha, sigma = process.coefficients(TIMES, x0)
    target = parametrization.target(x0, epsilon, alpha, sigma)
    # epsilon divides by alpha, which is 4.5e-5 at t = 1
    assert torch.allclose(process.x0(target, x_t, TIMES), x0, rtol=0, atol=1e-10)
    assert process.losses(target, x0, epsilon, TIMES).abs().max() == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_x0_scale_is_the_size_of_the_derivative(schedule, parametrization):
    alpha, sigma = schedule.alpha(TIMES), schedule.sigma(TIMES)
    output = torch.randn(
        len(TIMES), dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True
    )
    x_t = torch.ones_like(alpha)
    x0 = parametrization.x0(output, x_t, alpha, sigma)
    (gradient,) = torch.autograd.grad(x0.sum(), output)
    assert torch.allclose(parametrization.x0_scale(alpha, sigma), gradient.abs(), rtol=1e-12)


def test_targets_by_hand():
    x0, epsilon, alpha, sigma = (torch.tensor(value) for value in (2.0, 3.0, 0.6, 0.8))
    assert Epsilon().target(x0, epsilon, alpha, sigma) == 3
    assert X0().target(x0, epsilon, alpha, sigma) == 2
    assert float(V().target(x0, epsilon, alpha, sigma)) == pytest.approx(0.6 * 3 - 0.8 * 2)
    assert Flow().target(x0, epsilon, alpha, sigma) == 1


def test_v_is_the_velocity_along_the_cosine():
    # v = d x_t / d phi with alpha = cos(phi), sigma = sin(phi) (Salimans & Ho 2022, appendix D)
    phi = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x0, epsilon = torch.tensor(0.3).double(), torch.tensor(-1.2).double()
    (velocity,) = torch.autograd.grad(torch.cos(phi) * x0 + torch.sin(phi) * epsilon, phi)
    assert torch.allclose(V().target(x0, epsilon, torch.cos(phi), torch.sin(phi)), velocity)


def test_flow_is_the_velocity_along_the_straight_line():
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x0, epsilon = torch.tensor(0.3).double(), torch.tensor(-1.2).double()
    schedule = FlowSchedule()
    (velocity,) = torch.autograd.grad(schedule.alpha(t) * x0 + schedule.sigma(t) * epsilon, t)
    assert torch.allclose(Flow().target(x0, epsilon, schedule.alpha(t), schedule.sigma(t)), velocity)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_denoiser_is_one_x0_in_every_parametrization(schedule, images):
    x0, epsilon = images
    inner = TIMES[1:-1]
    x0, epsilon = x0[1:-1], epsilon[1:-1]
    estimate = x0 + 0.1  # what a network believes; it implies an epsilon for the x_t it saw
    processes = [DiffusionProcess(schedule, parametrization, Plain()) for parametrization in PARAMETRIZATIONS]
    x_t = processes[0].add_noise(x0, epsilon, inner)
    alpha, sigma = processes[0].coefficients(inner, x0)
    implied = (x_t - alpha * estimate) / sigma
    for process in processes:
        output = process.parametrization.target(estimate, implied, alpha, sigma)
        assert torch.allclose(process.x0(output, x_t, inner), estimate, rtol=0, atol=1e-9)


def test_losses_are_means_of_squares_per_image():
    process = DiffusionProcess(CosineSchedule(), Epsilon(), Plain())
    x0, epsilon = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    output = torch.stack([torch.full((1, 2, 2), 3.0), torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])])
    losses = process.losses(output.bfloat16(), x0, epsilon, torch.tensor([0.2, 0.9]))
    assert losses.dtype == torch.float32
    assert losses.tolist() == [9.0, 0.25]


def test_augmentation_preserves_variance_and_level_0_is_exact():
    generator = torch.Generator().manual_seed(0)
    low_res, noise = (torch.randn(3, 3, 32, 32, generator=generator) for _ in range(2))
    level = torch.tensor([0.0, 0.5, 1.0])
    noised = LowResAugmentation()(low_res, level, noise)
    assert torch.equal(noised[0], low_res[0])
    assert torch.allclose(noised[1], (low_res[1] + noise[1]) / 2**0.5, atol=1e-6)
    assert torch.allclose(noised[2], noise[2], atol=1e-3)
    assert (noised.flatten(1).var(1) - 1).abs().max() < 0.1
    with pytest.raises(InputError, match=r"max_level 1\.5"):
        LowResAugmentation(max_level=1.5)
