"""Differences: intervals against published examples, brute force and their own coverage."""

import math
from dataclasses import replace

import pytest
import torch

from imagen_lightning.catalog import SUBSETS
from imagen_lightning.evaluation.measures import CAPTION_ACCURACY, CLIP_SCORE, Measured
from imagen_lightning.finetuning.evidence_differences import (
    PAIRED,
    PAIRED_SHARES,
    QUADRATURE,
    differences,
    frechet_difference,
    paired_shares,
    reading,
)
from imagen_lightning.metrics.frechet import FeatureMoments, frechet_distance
from imagen_lightning.metrics.protocol import Protocol, Value
from imagen_lightning.metrics.values import mean_value, share_value


def table(both, only_after, only_before, neither):
    after = [True] * (both + only_after) + [False] * (only_before + neither)
    before = [True] * both + [False] * only_after + [True] * only_before + [False] * neither
    return torch.tensor(before), torch.tensor(after)


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        ((14, 5, 0, 22), 0.011, 0.226),  # Altman et al. 2000, Statistics with confidence, p. 52
        ((1, 1, 7, 12), -0.507, -0.026),  # Fagerland et al. 2017, Statistical Analysis of Contingency Tables, table 8.7
    ],
)
def test_paired_shares_are_the_published_ones(counts, low, high):
    found = paired_shares(*table(*counts))
    assert found == (pytest.approx(low, abs=1e-3), pytest.approx(high, abs=1e-3))


def test_shares_that_do_not_change_have_a_width():
    low, high = paired_shares(*table(200, 0, 0, 0))
    assert low < 0 < high
    assert high - low < 0.04


def test_paired_shares_cover():
    generator = torch.Generator().manual_seed(0)
    chances = torch.tensor([0.7, 0.1, 0.05, 0.15], dtype=torch.float64)  # both, only after, only before, neither
    hits = 0
    for _ in range(400):
        counts = torch.multinomial(chances, 100, replacement=True, generator=generator).bincount(minlength=4)
        low, high = paired_shares(*table(*counts.tolist()))
        hits += low <= 0.05 <= high
    assert 0.925 <= hits / 400 <= 0.99


def normal(count, seed, shift=0.0, dim=6):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def distance(features, reference):
    return frechet_distance(FeatureMoments.of(features), FeatureMoments.of(reference))


def test_the_frechet_difference_spreads_as_fresh_draws_do():
    """The interval's width beside the spread over independent draws, with noise that both share and that cancels."""
    reference = normal(3000, 0)

    def draw(seed):
        common = 2 * normal(400, seed)
        before, after = common + 0.1 * normal(400, seed + 1, 3.0), common + 0.1 * normal(400, seed + 2, 1.0)
        return before, after, distance(before, reference), distance(after, reference)

    drawn = [draw(10 + 3 * k) for k in range(600)]
    truth = torch.tensor([after - before for *_, before, after in drawn])
    widths, hits = [], 0
    for first, second, before, after in drawn[:40]:
        low, high = frechet_difference(before, after, first, second, reference)
        widths.append(high - low)
        hits += low <= truth.mean() <= high
    assert sum(widths) / len(widths) == pytest.approx(2 * 1.96 * float(truth.std()), rel=0.08)
    assert hits >= 35


def test_pairs_are_sharper_than_quadrature():
    reference, common = normal(2000, 0), normal(400, 1)
    before, after = common + 0.5, common + 0.4
    low, high = frechet_difference(distance(before, reference), distance(after, reference), before, after, reference)
    assert high < 0
    apart = frechet_difference(0.0, 0.0, before, normal(400, 2) + 0.4, reference)
    assert high - low < (apart[1] - apart[0]) / 2


def measured(seed, shift):
    numbers = normal(50, seed, shift)[:, 0]
    shares = numbers > 0.5
    values = [
        share_value(CAPTION_ACCURACY, shares, Protocol("none")),
        mean_value(CLIP_SCORE, numbers, Protocol("none")),
        Value("FD-random", 1 + shift, 0.9 + shift, 1.2 + shift, Protocol("FD-random"), "95% bootstrap"),
        Value("KD-random", 1 - shift, 0.9 - shift, 1.1 - shift, Protocol("KD-random"), SUBSETS),
        Value("PSNR", math.inf, math.inf, math.inf, Protocol("PSNR"), "95% bootstrap"),
        Value("Inception score", 1.0, None, None, Protocol("Inception score")),
    ]
    return Measured(tuple(values), {CAPTION_ACCURACY: shares.double(), CLIP_SCORE: numbers})


def test_each_metric_has_its_interval():
    before, after = measured(0, 0.0), measured(0, 0.5)
    found = {item.metric: item for item in differences(before, after)}
    assert list(found) == [value.metric for value in before.values]
    assert found[CAPTION_ACCURACY].confidence == PAIRED_SHARES
    clip = found[CLIP_SCORE]
    assert clip.confidence == PAIRED
    assert (clip.value, clip.low, clip.high) == pytest.approx((0.5, 0.5, 0.5))  # every image gains the same
    assert clip.verdict == "better"
    distance_ = found["FD-random"]
    assert distance_.confidence == QUADRATURE
    assert distance_.low == pytest.approx(0.5 - math.hypot(0.1, 0.2))
    assert distance_.high == pytest.approx(0.5 + math.hypot(0.2, 0.1))
    assert distance_.verdict == "worse"
    kernel = found["KD-random"]
    assert kernel.high - kernel.low == pytest.approx(2 * 1.96 * math.hypot(0.1, 0.1))  # of two standard deviations
    assert kernel.verdict == "better"
    assert found["PSNR"].low is None
    assert found["PSNR"].verdict == "unclear"
    assert found["Inception score"].low is None


def test_distances_with_features_are_paired():
    before, after = measured(0, 0.0), measured(0, 0.5)
    features = {"FD-random": (normal(50, 1), normal(50, 2), normal(60, 3))}
    found = {item.metric: item for item in differences(before, after, features)}
    assert found["FD-random"].confidence == PAIRED


def test_a_metric_that_one_lacks_is_left_out():
    before = measured(0, 0.0)
    assert [item.metric for item in differences(before, replace(before, values=before.values[:1]))] == [
        CAPTION_ACCURACY
    ]


@pytest.mark.parametrize(
    ("metric", "low", "high", "expected"),
    [
        ("FID", 0.1, 0.2, "worse"), ("FID", -0.2, -0.1, "better"), ("FID", -0.1, 0.2, "alike"),
        ("FID", -0.1, 3.0, "unclear"), ("FID", 0.0, 0.2, "alike"), ("FID", None, None, "unclear"),
        ("caption accuracy", 0.01, 0.9, "better"), ("caption accuracy", -0.03, 0.04, "alike"),
        ("caption accuracy", -0.03, 0.4, "unclear"), ("caption accuracy", -0.4, 0.0, "unclear"),
        ("caption accuracy", 0.0, 0.0, "alike"), ("fidelity", 0.1, 0.2, "unclear"),
    ],
)  # fmt: skip
def test_readings(metric, low, high, expected):
    assert reading(metric, low, high, 2.0) == expected
