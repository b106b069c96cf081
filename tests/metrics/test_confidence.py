import math

import pytest
import torch
from scipy import stats

from imagen_lightning.errors import InputError
from imagen_lightning.metrics.confidence import bootstrap_frechet, bootstrap_mean, wilson
from imagen_lightning.metrics.frechet import FeatureMoments, frechet_distance


def test_wilson_agrees_with_scipy():
    for successes, count, level in [(0, 10, 0.95), (3, 10, 0.95), (10, 10, 0.95), (185, 200, 0.99), (1, 1, 0.5)]:
        theirs = stats.binomtest(successes, count).proportion_ci(level, method="wilson")
        assert wilson(successes, count, level=level) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_the_bootstrap_of_a_mean_is_its_standard_error_wide():
    numbers = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = bootstrap_mean(numbers, num_resamples=4000)
    error = float(numbers.std(correction=0)) / 20
    assert low == pytest.approx(float(numbers.mean()) - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(float(numbers.mean()) + 1.96 * error, abs=0.1 * error)
    assert bootstrap_mean(numbers) == bootstrap_mean(numbers)
    assert bootstrap_mean(numbers, seed=1) != bootstrap_mean(numbers)
    narrow = bootstrap_mean(numbers, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_the_bootstrap_covers_as_often_as_it_says():
    covered = 0
    for seed in range(300):
        numbers = torch.empty(50, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(seed))
        low, high = bootstrap_mean(numbers, seed=seed, num_resamples=300)
        covered += low <= 1 <= high
    # 95% by name; skewed numbers at this size lose some
    assert 0.89 <= covered / 300 <= 0.98


def test_the_bootstrap_takes_constants_and_infinities():
    assert bootstrap_mean(torch.full((5,), 2.0)) == (2.0, 2.0)
    assert bootstrap_mean(torch.tensor([True, True, False, False]).double())[0] >= 0
    low, high = bootstrap_mean(torch.tensor([30.0, 31.0, math.inf]))
    assert 30 <= low < 32
    assert high == math.inf


@pytest.mark.parametrize(("num", "shift"), [(150, 0.5), (40, 0.5)])
def test_the_interval_of_the_distance_is_its_spread_over_draws(num, shift):
    # more and fewer samples than features
    dim = 64
    scale = torch.arange(1, dim + 1, dtype=torch.float64) ** -0.7

    def draw(count, seed, shift=0.0):
        noise = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return (noise * scale * (1 + shift) + shift * 0.3).relu()

    reference = FeatureMoments.of(draw(3000, 1 << 20))
    draws = [draw(num, seed, shift) for seed in range(150)]
    distances = torch.tensor([frechet_distance(FeatureMoments.of(x), reference) for x in draws])
    spread = 2 * 1.96 * float(distances.std())
    widths = []
    for x, distance in zip(draws[:20], distances.tolist()):
        low, high = bootstrap_frechet(distance, x, reference)
        assert low < distance < high
        widths.append(high - low)
    # the spread itself is known to 6%
    assert sum(widths) / len(widths) == pytest.approx(spread, rel=0.2)


def test_what_has_no_interval():
    for call, message in [
        (lambda: bootstrap_mean(torch.ones(1)), "at least 2 samples, not 1"),
        (lambda: bootstrap_mean(torch.ones(3), level=95), "level of 95 must lie between 0 and 1"),
        (lambda: wilson(1, 2, level=0.0), "level of 0.0"),
        (lambda: wilson(3, 2), "share of 3 among 2"),
        (lambda: wilson(0, 0), "share of 0 among 0"),
        (lambda: bootstrap_frechet(1.0, torch.ones(1, 2), FeatureMoments(2)), "at least 2 samples"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
