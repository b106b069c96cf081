"""Kernel distance, precision and recall, Inception score: against loops, closed forms and the libraries."""

import math

import numpy as np
import pytest
import torch

from imagen_lightning.errors import InputError
from imagen_lightning.metrics.inception_score import inception_score
from imagen_lightning.metrics.kid import kernel_distance
from imagen_lightning.metrics.precision_recall import precision_recall


def features(num, dim=16, seed=0, shift=0.0):
    return shift + torch.randn(num, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mmd_by_loops(x, y):
    def k(a, b):
        return float(a @ b / len(a) + 1) ** 3

    m = len(x)
    within = sum(k(z[i], z[j]) for z in (x, y) for i in range(m) for j in range(m) if i != j)
    return within / (m * (m - 1)) - 2 * sum(k(a, b) for a in x for b in y) / m**2


def test_the_kernel_distance_is_its_definition():
    x, y = features(12, seed=0), features(12, seed=1, shift=0.3)
    found = kernel_distance(x, y, num_subsets=3, subset_size=12)
    assert found.value == pytest.approx(mmd_by_loops(x, y), rel=1e-12)
    assert found.std == pytest.approx(0, abs=1e-12)
    assert found.settings == "3 subsets of 12"


def test_whole_kernels_and_a_kernel_a_subset_agree():
    # 300 x 280 is more than 2 x 60^2 and less than 40 x 60^2: the two ways of computing
    x, y = features(300, seed=0), features(280, seed=1, shift=0.2)
    generator = torch.Generator().manual_seed(5)
    pairs = [[torch.randperm(n, generator=generator)[:60] for n in (300, 280)] for _ in range(40)]
    expected = torch.tensor([mmd_by_loops(x[a], y[b]) for a, b in pairs[:2]], dtype=torch.float64)
    few = kernel_distance(x, y, num_subsets=2, subset_size=60, seed=5)
    assert few.value == pytest.approx(float(expected.mean()), rel=1e-10)
    assert few.std == pytest.approx(float(expected.std(correction=0)), rel=1e-8)
    each = [kernel_distance(x[a], y[b], num_subsets=1, subset_size=60).value for a, b in pairs]
    many = kernel_distance(x, y, num_subsets=40, subset_size=60, seed=5)
    assert many.value == pytest.approx(np.mean(each), rel=1e-10)
    assert many.std == pytest.approx(np.std(each), rel=1e-8)
    assert kernel_distance(x, y, seed=6).value != kernel_distance(x, y).value
    assert kernel_distance(x, y) == kernel_distance(x, y)
    assert kernel_distance(x, y).subset_size == 140


def test_the_kernel_distance_agrees_with_the_libraries():
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torchmetrics.image.kid import poly_mmd

    x, y = features(200, 64, seed=0), features(200, 64, seed=1, shift=0.2)
    found = kernel_distance(x, y, num_subsets=2, subset_size=200)
    assert found.value == pytest.approx(float(poly_mmd(x, y)), rel=1e-9)
    theirs = kid_features_to_metric(x, y, kid_subsets=2, kid_subset_size=200, verbose=False)
    assert found.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)


def test_the_kernel_distance_is_unbiased():
    values = [
        kernel_distance(features(40, 4, 2 * i), features(40, 4, 2 * i + 1), num_subsets=1, subset_size=40).value
        for i in range(300)
    ]
    assert np.mean(values) == pytest.approx(0, abs=4 * np.std(values) / math.sqrt(300))
    assert min(values) < 0 < max(values)


@pytest.mark.parametrize(("num_x", "num_y", "k"), [(400, 300, 3), (2100, 1200, 5), (8, 5, 4)])
def test_precision_and_recall_agree_with_torch_fidelity(num_x, num_y, k):
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = features(num_x, 4, 0), features(num_y, 4, 1, shift=1.0)
    found = precision_recall(x, y, num_neighbours=k)
    theirs = prc_features_to_metric(x, y, prc_neighborhood=k, prc_batch_size=500, save_cpu_ram=False, verbose=False)
    # theirs are means in float32
    assert found.precision == pytest.approx(theirs["precision"], abs=1e-6)
    assert found.recall == pytest.approx(theirs["recall"], abs=1e-6)
    assert len(found.is_real) == num_x
    assert len(found.is_covered) == num_y


def test_precision_and_recall_of_plain_cases():
    line = torch.arange(10.0)[:, None]
    # each ball reaches one step: 0.5 is within, 11 is not
    found = precision_recall(torch.tensor([[0.5], [5.5], [11.0], [12.0]]), line, num_neighbours=1)
    assert found.is_real.tolist() == [True, True, False, False]
    # the balls around 0.5 and 5.5 have radius 5, those of 11 and 12 radius 1
    assert found.is_covered.tolist() == [True] * 10
    assert precision_recall(line, line, num_neighbours=1).precision == 1
    apart = precision_recall(line, line + 1e9, num_neighbours=3)
    assert (apart.precision, apart.recall) == (0, 0)
    # a large common offset costs no accuracy
    far = precision_recall(
        torch.tensor([[0.5], [5.5], [11.0], [12.0]]).double() + 1e6, line.double() + 1e6, num_neighbours=1
    )
    assert torch.equal(far.is_real, found.is_real)
    assert torch.equal(far.is_covered, found.is_covered)


def test_the_inception_score_of_plain_cases():
    # classes that are certain and even: as many as there are; all alike: 1
    certain = torch.eye(8, dtype=torch.float64).repeat(4, 1) * 1e4
    assert inception_score(certain, num_splits=1).value == pytest.approx(8, rel=1e-12)
    assert inception_score(torch.zeros(20, 8), num_splits=2).value == pytest.approx(1, rel=1e-12)
    assert inception_score(certain[:1], num_splits=1).value == pytest.approx(1)


def test_the_inception_score_agrees_with_torch_fidelity():
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * features(203, 20)
    one = inception_score(logits, num_splits=1)
    theirs = isc_features_to_metric(logits, splits=1, shuffle=True)
    assert one.value == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    order = torch.randperm(203, generator=torch.Generator().manual_seed(4))
    theirs = isc_features_to_metric(logits[order], splits=10, shuffle=False)
    found = inception_score(logits, seed=4)
    assert found.value == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert found.std == pytest.approx(theirs["inception_score_std"], rel=1e-10)
    assert found.settings == "10 splits"


def test_what_cannot_be_measured():
    x = features(10)
    for call, message in [
        (lambda: kernel_distance(x, x, subset_size=11), r"subsets of 11; .* in 2\.\.10"),
        (lambda: kernel_distance(x[:3], x), "subsets of 1; take at least 4 samples"),
        (lambda: kernel_distance(x, x, num_subsets=0), "at least 1 subset, not 0"),
        (lambda: precision_recall(x, x, num_neighbours=10), "10 neighbours of 10 generated and 10 real"),
        (lambda: precision_recall(x, x, num_neighbours=0), "0 neighbours"),
        (lambda: inception_score(x, num_splits=11), "10 samples cannot have 11 splits"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
    for call in (kernel_distance, precision_recall):
        with pytest.raises(ValueError, match="features"):
            call(x, x[:, :3])
