import pytest
import torch

from imagen_lightning.diffusion import X0, CosineSchedule, Epsilon, Flow, FlowSchedule, MinSNR, Plain, V
from imagen_lightning.types import InputError

TIMES = torch.tensor([0.01, 0.1, 0.25, 0.4, 0.6, 0.9, 0.99], dtype=torch.float64)
PARAMETRIZATIONS = [Epsilon(), X0(), V(), Flow()]


def levels(schedule, times=TIMES):
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    return alpha, sigma, (alpha / sigma) ** 2


@pytest.mark.parametrize("gamma", [5.0, 1.0])
def test_min_snr_closed_forms(gamma):
    alpha, sigma, snr = levels(CosineSchedule())
    assert snr.min() < gamma < snr.max()
    capped = snr.clamp(max=gamma)
    weighting = MinSNR(gamma)
    # Hang et al. 2023, section 3.4
    assert torch.allclose(weighting(alpha, sigma, X0()), capped)
    assert torch.allclose(weighting(alpha, sigma, Epsilon()), capped / snr)
    assert torch.allclose(weighting(alpha, sigma, V()), capped / (snr + 1))


@pytest.mark.parametrize("schedule", [CosineSchedule(), FlowSchedule()])
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_min_snr_weighs_the_same_error_of_x0_the_same(schedule, parametrization):
    alpha, sigma, snr = levels(schedule)
    x_t, output = torch.ones_like(alpha), torch.full_like(alpha, 0.3)
    error_of_output = 1e-3
    error_of_x0 = parametrization.x0(output + error_of_output, x_t, alpha, sigma) - parametrization.x0(
        output, x_t, alpha, sigma
    )
    loss = MinSNR()(alpha, sigma, parametrization) * error_of_output**2
    assert torch.allclose(loss, snr.clamp(max=5.0) * error_of_x0**2, rtol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_min_snr_at_the_ends(dtype):
    # alpha / sigma overflows as sigma goes to 0, where the weights are 0 for epsilon, v and flow and gamma for x0
    sigma = torch.tensor([0.0, 1e-38, 1e-20], dtype=dtype)
    alpha = torch.ones_like(sigma)
    assert torch.equal(MinSNR()(alpha, sigma, X0()), torch.full_like(alpha, 5.0))
    for parametrization in (Epsilon(), V(), Flow()):
        weights = MinSNR()(alpha, sigma, parametrization)
        assert weights.isfinite().all()
        assert weights.abs().max() < 1e-30
    alpha, sigma, snr = levels(CosineSchedule(), torch.ones(1, dtype=dtype))
    assert torch.allclose(MinSNR()(alpha, sigma, Epsilon()), torch.ones(1, dtype=dtype))
    assert torch.allclose(MinSNR()(alpha, sigma, X0()), snr)


def test_min_snr_is_continuous_where_it_caps():
    gamma = 5.0
    snr = gamma * torch.tensor([1 - 1e-9, 1 + 1e-9], dtype=torch.float64)
    alpha, sigma = (snr / (1 + snr)).sqrt(), (1 / (1 + snr)).sqrt()
    for parametrization in PARAMETRIZATIONS:
        below, above = MinSNR(gamma)(alpha, sigma, parametrization).tolist()
        assert below == pytest.approx(above, rel=1e-8)


def test_plain_is_one():
    alpha, sigma, _ = levels(CosineSchedule())
    for parametrization in PARAMETRIZATIONS:
        assert torch.equal(Plain()(alpha, sigma, parametrization), torch.ones_like(alpha))


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan")])
def test_gamma_must_be_positive(gamma):
    with pytest.raises(InputError, match="gamma"):
        MinSNR(gamma)
