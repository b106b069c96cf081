"""Copying: neighbours against scipy and brute force, copies are found, fresh and blurred images are not."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial import cKDTree

from imagen_lightning.errors import InputError
from imagen_lightning.finetuning.evidence_copying import (
    NEAR_BY_DISTANCE,
    NEAR_COPIES,
    authentic,
    copying_values,
    data_copying_z,
    near_everywhere,
    near_share,
    nearer_probability,
    neighbours,
    own_distances,
)
from imagen_lightning.metrics.protocol import Protocol


def vectors(count, seed, dim=24):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_neighbours_agree_with_scipy():
    images, training = vectors(300, 0), vectors(2500, 1)
    found = neighbours(images.float(), training.float())
    distances, numbers = cKDTree(training.float().double().numpy()).query(images.float().double().numpy(), k=50)
    assert found.numbers.tolist() == numbers[:, 0].tolist()
    np.testing.assert_allclose(found.distances, distances[:, 0], rtol=1e-12)
    np.testing.assert_allclose(found.ratios, distances[:, 0] / distances.mean(1), rtol=1e-9)


def test_a_copy_has_distance_zero_and_a_mirrored_one_too():
    training = vectors(100, 1).float() + 1000  # far from the origin, where products of large numbers cancel
    flipped = training.flip(1)
    found = neighbours(flipped[:5], training, mirrored=flipped[:5].flip(1))
    assert found.numbers.tolist() == [0, 1, 2, 3, 4]
    assert found.distances.tolist() == [0] * 5
    assert found.ratios.tolist() == [0] * 5
    assert (neighbours(flipped[:5], training).distances > 1).all()


def test_own_distances_leave_the_image_itself_out():
    training = vectors(400, 2)
    expected = cKDTree(training.numpy()).query(training.numpy(), k=2)[0][:, 1]
    np.testing.assert_allclose(own_distances(training, torch.arange(400)), expected, rtol=1e-10)


def test_authenticity_is_that_of_its_definition():
    images, training = vectors(60, 3), vectors(80, 4)
    found = authentic(neighbours(images, training), training)
    for image, own in zip(images, found):
        distances = (training - image).norm(dim=1)
        nearest = int(distances.argmin())
        others = (training - training[nearest]).norm(dim=1)
        others[nearest] = math.inf
        assert bool(own) == bool(distances[nearest] > others.min())


def test_the_probability_and_z_are_those_of_mann_and_whitney():
    samples, held_out = vectors(70, 5)[:, 0].abs(), vectors(90, 6)[:, 0].abs()
    held_out[:10] = samples[:10]  # ties
    u = stats.mannwhitneyu(samples.numpy(), held_out.numpy()).statistic  # pairs in which the sample is farther
    assert nearer_probability(samples, held_out) == pytest.approx(1 - u / (70 * 90), abs=1e-12)
    expected = (u - 70 * 90 / 2) / math.sqrt(70 * 90 * (70 + 90 + 1) / 12)
    assert data_copying_z(samples, held_out) == pytest.approx(expected, abs=1e-9)


def values(samples, held_out, training):
    known = neighbours(held_out, training)
    found = copying_values(neighbours(samples, training), known, training, Protocol("none"))
    return {value.metric: value for value in found}


def test_fresh_samples_are_no_copies():
    training, held_out, samples = vectors(1000, 7), vectors(300, 8), vectors(300, 9)
    found = values(samples, held_out, training)
    assert found[NEAR_COPIES].low <= 0.05
    assert found[NEAR_BY_DISTANCE].low <= 0.05 <= found[NEAR_BY_DISTANCE].high
    assert found["nearer than a held-out image"].low <= 0.5 <= found["nearer than a held-out image"].high


def test_noisy_copies_are_found():
    training, held_out, fresh = vectors(1000, 7), vectors(300, 8), vectors(200, 9)
    copies = training[:100] + 0.2 * vectors(100, 10)
    found = values(torch.cat([copies, fresh]), held_out, training)
    for metric in (NEAR_COPIES, NEAR_BY_DISTANCE):
        assert found[metric].low > 0.25
        assert 1 / 3 <= found[metric].value < 0.45
    assert found["authenticity"].value < 0.75


def test_blurred_pictures_are_near_by_distance_and_no_copies():
    """Shrunk towards the mean, as blur and low contrast do, an image is nearer to all training images alike."""
    training, held_out = vectors(1000, 7), vectors(300, 8)
    found = values(0.3 * vectors(300, 9), held_out, training)
    assert found[NEAR_BY_DISTANCE].low > 0.3
    assert found[NEAR_COPIES].low <= 0.05


def test_pictures_unlike_any_other_are_no_copies():
    """Beyond one training image, a picture is far from all, and least far from that one by ratio."""
    training, held_out, samples = vectors(1000, 7), vectors(300, 8), vectors(300, 9)
    training[0, 0], samples[:, 0] = 30, 40
    found = values(samples, held_out, training)
    assert found[NEAR_COPIES].value == 0
    assert neighbours(samples, training).ratios.max() < neighbours(held_out, training).ratios.quantile(0.05)


def test_copies_are_near_in_every_space_and_flat_pictures_in_one():
    training, held_out = vectors(1000, 7), vectors(300, 8)
    other, other_held_out = training @ vectors(24, 11), held_out @ vectors(24, 11)
    real = [neighbours(held_out, training), neighbours(other_held_out, other)]
    copies = training[:100] + 0.2 * vectors(100, 10)
    found = [neighbours(copies, training), neighbours(copies @ vectors(24, 11), other)]
    value = near_everywhere(found, real, Protocol("none"))
    assert value.value == 1
    assert value.low > 0.9
    assert value.high == 1
    found[1] = neighbours(other[100:200], other)  # near to another image there
    nothing = near_everywhere(found, real, Protocol("none"))
    assert nothing.value == nothing.low == 0
    assert 0.02 < nothing.high < 0.05  # Wilson's of 0 among 100
    found[1] = neighbours(vectors(100, 12) @ vectors(24, 11), other)
    assert near_everywhere(found, real, Protocol("none")).value == 0


def test_the_share_s_interval_covers_at_its_level():
    """Of 5% in truth, over many draws of both sets, 95% within some."""
    hits = 0
    for seed in range(60):
        training = vectors(200, 1000 + seed, dim=4)
        found = values(vectors(80, 2000 + seed, dim=4), vectors(80, 3000 + seed, dim=4), training)[NEAR_BY_DISTANCE]
        hits += found.low <= 0.05 <= found.high
    assert hits >= 54  # of 57 at 95%


def test_few_images_are_refused():
    with pytest.raises(InputError, match="at least 20 held-out images, not 19"):
        values(vectors(30, 0), vectors(19, 1), vectors(50, 2))
    with pytest.raises(InputError, match="at least 2 training images, not 1"):
        neighbours(vectors(3, 0), vectors(1, 1))
    with pytest.raises(ValueError, match="have no distance"):
        neighbours(vectors(3, 0), vectors(5, 1, dim=3))


def test_shares_of_nothing_near():
    assert near_share(torch.tensor([5.0, 6.0]), torch.arange(100.0) / 100) == 0
