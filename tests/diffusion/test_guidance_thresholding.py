import pytest
import torch

from imagen_lightning.diffusion import DynamicThresholding, StaticThresholding, guide, threshold
from imagen_lightning.types import Denoised, InputError

T = torch.tensor([0.5, 0.6])


@pytest.fixture
def x():
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def conditional(x_t):
    return 2 * x_t + 1


def unconditional(x_t):
    return x_t.square()


def pair(x_t, t):
    assert torch.equal(t, torch.cat([T, T]))
    with_text, without = x_t.chunk(2)
    return torch.cat([conditional(with_text), unconditional(without)])


def pair_with_variance(x_t, t):
    x0 = pair(x_t, t)
    return Denoised(x0, torch.cat([torch.full_like(x0[:2], 0.1), torch.full_like(x0[:2], 0.9)]))


def test_guidance_identities(x):
    assert torch.allclose(guide(pair, 1.0)(x, T), conditional(x))
    assert torch.allclose(guide(pair, 0.0)(x, T), unconditional(x))
    assert torch.allclose(guide(pair, 3.0)(x, T), 3 * conditional(x) - 2 * unconditional(x))
    assert torch.allclose(guide(pair, 4)(x, T), guide(pair, 4.0)(x, T))


@pytest.mark.parametrize("weights", [[1.0, 3.0], (1, 3), torch.tensor([1.0, 3.0])])
def test_one_weight_an_image(x, weights):
    result = guide(pair, weights)(x, T)
    assert result.dtype == x.dtype
    assert torch.allclose(result[0], guide(pair, 1.0)(x, T)[0])
    assert torch.allclose(result[1], guide(pair, 3.0)(x, T)[1])


def test_guidance_in_x0_is_guidance_in_epsilon(x):
    alpha, sigma, scale = 0.6, 0.8, 5.0
    epsilons = [(x - alpha * x0) / sigma for x0 in (conditional(x), unconditional(x))]
    epsilon = epsilons[1] + scale * (epsilons[0] - epsilons[1])
    assert torch.allclose(guide(pair, scale)(x, T), (x - sigma * epsilon) / alpha)


def test_guidance_takes_the_conditional_variance(x):
    result = guide(pair_with_variance, 2.0)(x, T)
    assert torch.allclose(result.x0, guide(pair, 2.0)(x, T))
    assert torch.equal(result.variance, torch.full_like(x, 0.1))


@pytest.mark.parametrize("rule", [StaticThresholding(), DynamicThresholding()])
def test_thresholding_touches_x0_alone(x, rule):
    variance = torch.full_like(x, 7.0)
    denoise = threshold(lambda x_t, t: Denoised(3 * x_t, variance), rule)
    result = denoise(x, T)
    assert torch.equal(result.variance, variance)
    assert torch.equal(result.x0, rule(3 * x))
    assert torch.equal(threshold(lambda x_t, t: 3 * x_t, rule)(x, T), rule(3 * x))


def test_static_thresholding_clips():
    x0 = torch.tensor([-3.0, -1.0, 0.2, 1.0, 1.5])
    assert torch.equal(StaticThresholding()(x0), torch.tensor([-1.0, -1.0, 0.2, 1.0, 1.0]))


@pytest.mark.parametrize("percentile", [0.5, 0.8, 0.95, 0.995, 0.9999, 1.0])
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_dynamic_thresholding_is_the_quantile_of_each_image(percentile, scale):
    x0 = scale * torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    x0[1] *= 0.1
    s = torch.quantile(x0.abs().flatten(1), percentile, dim=1).clamp(1, 2.5)[:, None, None, None]
    expected = torch.minimum(torch.maximum(x0, -s), s) / s
    result = DynamicThresholding(percentile, max_value=2.5)(x0)
    assert torch.allclose(result, expected, rtol=0, atol=1e-6)
    assert result.abs().max() <= 1
    if scale == 0.3 and percentile < 0.99:
        assert torch.equal(result, x0.clamp(-1, 1))  # s is at least 1


def test_dynamic_thresholding_keeps_dtype_and_images_apart():
    x0 = 2 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    rule = DynamicThresholding(0.9, 1.5)
    assert torch.equal(torch.cat([rule(x0[:1]), rule(x0[1:])]), rule(x0))
    assert rule(x0.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("arguments", [{"percentile": 0.0}, {"percentile": 1.01}, {"max_value": 0.9}])
def test_dynamic_thresholding_refuses(arguments):
    with pytest.raises(InputError, match=next(iter(arguments))):
        DynamicThresholding(**arguments)
