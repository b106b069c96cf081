import pytest
import torch

from imagen_lightning.diffusion import (
    P2,
    X0,
    CosineSchedule,
    Epsilon,
    Flow,
    FlowSchedule,
    MinSNR,
    Plain,
    SigmoidWeighting,
    TruncatedSNR,
    V,
)
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


# weights of the squared error of x0, by the SNR
ON_X0 = [
    (MinSNR(), lambda snr: snr.clamp(max=5.0)),
    (TruncatedSNR(), lambda snr: snr.clamp(min=1.0)),  # Salimans & Ho 2022, section 4
    (SigmoidWeighting(1.5), lambda snr: snr * torch.sigmoid(1.5 - snr.log())),  # Kingma & Gao 2023
    (P2(), lambda snr: snr / (1 + snr)),  # Choi et al. 2022, eq. 8
    (P2(0.5, 2.0), lambda snr: snr / (2 + snr).sqrt()),
    (P2(0.0), lambda snr: snr),
]


@pytest.mark.parametrize(("weighting", "on_x0"), ON_X0)
@pytest.mark.parametrize("schedule", [CosineSchedule(), FlowSchedule()])
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_the_same_error_of_x0_weighs_the_same(schedule, parametrization, weighting, on_x0):
    alpha, sigma, snr = levels(schedule)
    x_t, output = torch.ones_like(alpha), torch.full_like(alpha, 0.3)
    error_of_output = 1e-3
    error_of_x0 = parametrization.x0(output + error_of_output, x_t, alpha, sigma) - parametrization.x0(
        output, x_t, alpha, sigma
    )
    loss = weighting(alpha, sigma, parametrization) * error_of_output**2
    assert torch.allclose(loss, on_x0(snr) * error_of_x0**2, rtol=1e-8)


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


@pytest.mark.parametrize("weighting", [TruncatedSNR(), SigmoidWeighting(), P2()])
@pytest.mark.parametrize("parametrization", [Epsilon(), V(), Flow()])
def test_the_other_weightings_are_finite_near_the_data(weighting, parametrization):
    sigma = torch.tensor([1e-12, 1e-8], dtype=torch.float32)
    weights = weighting(torch.ones_like(sigma), sigma, parametrization)
    assert weights.isfinite().all()
    assert weights.max() < 1.01


@pytest.mark.parametrize(("gamma", "k"), [(-0.1, 1.0), (1.0, 0.0), (float("nan"), 1.0)])
def test_p2_arguments(gamma, k):
    with pytest.raises(InputError, match="P2 gamma"):
        P2(gamma, k)
