import json

import pytest
import torch
from given_data import given

from imagen_lightning.errors import InputError
from imagen_lightning.metrics.frechet import (
    FeatureMoments,
    factored,
    frechet_distance,
    frechet_influence,
    gaussian_frechet_distance,
)


def features(num, dim, seed=0, shift=0.0, scale=1.0):
    """(num, dim) float64 with correlated columns."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(7), dtype=torch.float64) / dim**0.5
    return shift + scale * torch.randn(num, dim, generator=generator, dtype=torch.float64) @ mixing


def by_singular_values(x, y):
    """The distance without any root of a covariance: tr (S_1 S_2)^1/2 is the nuclear norm of X Y^T (both centred)."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = (x - mean_x) / (len(x) - 1) ** 0.5, (y - mean_y) / (len(y) - 1) ** 0.5
    norm = torch.linalg.svdvals(x @ y.T).sum()
    return float((mean_x - mean_y).square().sum() + x.square().sum() + y.square().sum() - 2 * norm)


def distance(x, y):
    return frechet_distance(FeatureMoments.of(x), FeatureMoments.of(y))


def test_commuting_covariances_have_a_closed_form():
    # S_i = Q diag(a_i) Q^T: d^2 = |mu_1 - mu_2|^2 + sum (sqrt a_1 - sqrt a_2)^2
    dim = 40
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    a, b, mean = torch.rand(3, dim, generator=generator, dtype=torch.float64)
    expected = float(mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    zero = torch.zeros(dim, dtype=torch.float64)
    found = gaussian_frechet_distance(zero, q * a @ q.T, mean, q * b @ q.T)
    assert found == pytest.approx(expected, rel=1e-12)
    # with both singular, through the fallback; an eigenvalue that is 0 comes out as eps, its root as 1e-8
    a[::3], b[::2] = 0, 0
    expected = float(mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert gaussian_frechet_distance(zero, q * a @ q.T, mean, q * b @ q.T) == pytest.approx(expected, rel=1e-8)


def test_the_published_value():
    reference = given("reference", "diffusers_scheduler_expected.json")
    assert json.loads(reference.read_text())["fid_math"]["case"] == (
        "mu 0 vs 1 in R^2048, both covariances I -> FID exactly 2048"
    )
    zero, eye = torch.zeros(2048, dtype=torch.float64), torch.eye(2048, dtype=torch.float64)
    assert gaussian_frechet_distance(zero, eye, zero + 1, eye) == pytest.approx(2048, rel=1e-13)


@pytest.mark.parametrize(("num_x", "num_y"), [(300, 200), (300, 20), (20, 300), (30, 20), (2, 2)])
@pytest.mark.parametrize("block", [64, 23])
def test_any_number_of_samples(num_x, num_y, block, monkeypatch):
    monkeypatch.setattr("imagen_lightning.metrics.frechet._BLOCK", block)
    x, y = features(num_x, 64, 0), features(num_y, 64, 1, shift=0.1, scale=1.3)
    assert distance(x, y) == pytest.approx(by_singular_values(x, y), rel=1e-9)
    assert distance(y, x) == pytest.approx(distance(x, y), rel=1e-9)


def test_dead_and_repeated_features():
    x, y = features(300, 16, 0), features(200, 16, 1, shift=0.2)
    for z in (x, y):
        z[:, 3] = 0.0
        z[:, 5] = z[:, 4]
    assert distance(x, y) == pytest.approx(by_singular_values(x, y), rel=1e-9)
    assert factored(FeatureMoments.of(x).covariance).shape == (16, 14)


def test_equal_sets_have_no_distance():
    x = features(100, 32)
    assert 0 <= distance(x, x) < 1e-7
    assert 0 <= distance(x[:10], x[:10]) < 1e-7


def test_large_means_do_not_cancel():
    x, y = features(200, 8, 0), features(200, 8, 1, scale=1.5)
    expected = by_singular_values(x, y)
    moments = [FeatureMoments(8) for _ in range(2)]
    for moment, rows in zip(moments, (x, y)):
        for part in (rows + 1e6).split(32):
            moment.update(part)
    assert frechet_distance(*moments) == pytest.approx(expected, rel=1e-6)


def test_batches_and_parts_merge_into_the_whole():
    x = features(101, 24, shift=3.0)
    whole = FeatureMoments.of(x)
    assert torch.allclose(whole.mean, x.mean(0), rtol=1e-13)
    assert torch.allclose(whole.covariance, torch.cov(x.T), rtol=1e-11, atol=1e-13)
    parts = [FeatureMoments(24) for _ in range(3)]
    for start in range(0, 101, 10):
        parts[start % 3].update(x[start : start + 10])
    parts[0].update(x[:0])
    merged = FeatureMoments(24)
    for part in [*parts, FeatureMoments(24)]:
        merged.merge(part)
    assert merged.count == 101
    for found, expected in ((merged.mean, whole.mean), (merged.scatter, whole.scatter)):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(merged.over_processes().scatter, merged.scatter)


@pytest.mark.parametrize("dim", [64, pytest.param(2048, marks=pytest.mark.slow)])
def test_agrees_with_torchmetrics_and_torch_fidelity(dim):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Identity(torch.nn.Module):
        num_features = dim

        def forward(self, x):
            return x

    x, y = features(dim + 500, dim, 0), features(dim + 200, dim, 1, shift=0.05, scale=1.2)
    found = distance(x, y)
    theirs = FrechetInceptionDistance(feature=Identity())
    for part in x.split(400):
        theirs.update(part, real=True)
    theirs.update(y, real=False)
    assert found == pytest.approx(float(theirs.compute()), rel=1e-6)
    statistics = [fid_features_to_statistics(rows) for rows in (x, y)]
    fidelity = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert found == pytest.approx(fidelity, rel=1e-6)


def test_influence_is_the_derivative_by_a_samples_weight():
    for num in (40, 8):  # above and below the number of features
        x, reference = features(num, 12, 0), FeatureMoments.of(features(500, 12, 1, shift=0.3, scale=1.2))
        pulls = frechet_influence(x, reference)
        assert float(pulls.mean()) == pytest.approx(0, abs=1e-10)

        def weighted(weights, x=x, reference=reference):
            weights = weights / weights.sum()
            mean = weights @ x
            root = (x - mean) * weights.sqrt()[:, None]
            cross = torch.linalg.svdvals(root @ factored(reference.covariance)).sum()
            return (mean - reference.mean).square().sum() + root.square().sum() - 2 * cross

        for i in range(3):
            step = torch.zeros(num, dtype=torch.float64)
            step[i] = 1e-5
            one = torch.ones(num, dtype=torch.float64)
            slope = (weighted(one + step) - weighted(one - step)) / 2e-5 * num
            assert float(pulls[i]) == pytest.approx(float(slope), rel=1e-5, abs=1e-7)


def test_what_cannot_be_measured():
    x = features(10, 4)
    with pytest.raises(InputError, match="at least 2 samples, not 1"):
        distance(x, x[:1])
    x[3, 1], x[4, 0] = float("nan"), float("inf")
    with pytest.raises(InputError, match="features of 2 images are not finite"):
        distance(x, x)
    with pytest.raises(ValueError, match="moments of 4 features were given"):
        FeatureMoments(4).update(features(10, 5))
    with pytest.raises(ValueError, match="cannot take those of 5"):
        FeatureMoments(4).merge(FeatureMoments(5))
    with pytest.raises(ValueError, match="have no distance"):
        distance(features(10, 4), features(10, 5))
