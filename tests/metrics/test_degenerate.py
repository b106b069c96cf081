"""Sets that carry little: a constant one, equal images, fewer images than features, numbers that are not finite."""

import math

import pytest
import torch

from imagen_lightning.errors import InputError
from imagen_lightning.finetuning.evidence_differences import frechet_difference
from imagen_lightning.metrics.confidence import bootstrap_frechet, bootstrap_mean
from imagen_lightning.metrics.frechet import FeatureMoments, frechet_distance, frechet_influence
from imagen_lightning.metrics.inception_score import inception_score
from imagen_lightning.metrics.kid import kernel_distance
from imagen_lightning.metrics.precision_recall import precision_recall
from imagen_lightning.metrics.protocol import Protocol
from imagen_lightning.metrics.values import mean_value

DIM = 8


def random(count, seed=0):
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


SETS = {
    "constant": torch.full((12, DIM), 0.1),
    "zero": torch.zeros(12, DIM),
    "two equal": torch.full((2, DIM), 0.3),
    "two": random(2),
    "fewer than features": random(5),
    "one direction": random(12) * torch.eye(DIM)[0],
    "many": random(40),
}
FINITE = [(a, b) for a in SETS for b in SETS]


@pytest.mark.parametrize(("generated", "real"), FINITE)
def test_a_frechet_distance_and_its_interval_are_finite_and_in_order(generated, real):
    x, y = SETS[generated], SETS[real]
    moments = FeatureMoments.of(y)
    distance = frechet_distance(FeatureMoments.of(x), moments)
    low, high = bootstrap_frechet(distance, x, moments)
    assert 0 <= low <= distance + 1e-9
    assert distance - 1e-9 <= high < math.inf
    assert frechet_difference(distance, distance, x, x, y) == pytest.approx((0, 0))


def test_against_a_constant_set_the_distance_and_its_influence_have_closed_forms():
    """d^2 = |mu - c|^2 + tr S, whose first-order change by image i is |x_i - c|^2 - d^2 (S over N)."""
    x, c = random(30).double(), torch.full((DIM,), 0.1, dtype=torch.float64)
    moments = FeatureMoments.of(c.expand(9, DIM))
    expected = (x.mean(0) - c).square().sum() + x.T.cov().trace()
    assert frechet_distance(FeatureMoments.of(x), moments) == pytest.approx(float(expected))
    pulls = (x - c).square().sum(1)
    assert torch.allclose(frechet_influence(x, moments), pulls - pulls.mean())


def test_equal_constant_sets_are_at_distance_zero():
    same = SETS["constant"]
    assert frechet_distance(FeatureMoments.of(same), FeatureMoments.of(same)) == pytest.approx(0, abs=1e-12)
    assert kernel_distance(same, same).value == pytest.approx(0, abs=1e-12)
    found = precision_recall(same, same)
    assert (found.precision, found.recall) == (1, 1)
    assert inception_score(same).value == pytest.approx(1)


@pytest.mark.parametrize(("generated", "real"), [pair for pair in FINITE if min(len(SETS[n]) for n in pair) >= 4])
def test_the_other_distances_are_finite(generated, real):
    x, y = SETS[generated], SETS[real]
    found = kernel_distance(x, y)
    assert math.isfinite(found.value)
    assert math.isfinite(found.std)
    inside = precision_recall(x, y)
    assert 0 <= inside.precision <= 1
    assert 0 <= inside.recall <= 1


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_are_refused_by_name(count):
    few, many = random(count), random(40)
    with pytest.raises(InputError, match="at least 2 samples"):
        frechet_distance(FeatureMoments.of(few), FeatureMoments.of(many))
    with pytest.raises(InputError, match="subsets of 0"):
        kernel_distance(few, many)
    with pytest.raises(InputError, match="3 neighbours"):
        precision_recall(few, many)
    with pytest.raises(InputError, match="cannot have 10 splits"):
        inception_score(few)
    with pytest.raises(InputError, match="at least 2 samples"):
        bootstrap_mean(few[:, 0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad):
    broken = random(20)
    broken[3, 2] = bad
    for measure in (
        lambda: FeatureMoments.of(broken),
        lambda: kernel_distance(broken, random(20)),
        lambda: kernel_distance(random(20), broken),
        lambda: precision_recall(broken, random(20)),
        lambda: precision_recall(random(20), broken),
        lambda: inception_score(broken),
    ):
        with pytest.raises(InputError, match="features of 1 image are not finite"):
            measure()


def test_a_mean_of_nan_has_no_interval():
    numbers = torch.tensor([1.0, math.nan, 2.0])
    with pytest.raises(InputError, match="1 of 3 numbers are NaN"):
        bootstrap_mean(numbers)
    value = mean_value("PSNR", numbers, Protocol("none"))
    assert math.isnan(value.value)
    assert value.low is None
