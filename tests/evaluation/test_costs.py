"""Which stage costs how much: sums, intervals, and the sentence."""

import pytest
import torch

from imagen_lightning.evaluation.costs import Quality, judge

STAGES = ("base", "sr_64")


def shares(*numbers, count=400):
    """Qualities whose images are right in the given numbers of cases, nested as worse ones are in better ones."""
    made = []
    for right in numbers:
        per_image = (torch.arange(count) < right).double()
        made.append(Quality(per_image.mean().item(), per_image))
    return made


def test_costs_add_up_to_what_the_cascade_lacks():
    found = judge("caption accuracy", STAGES, shares(300, 380, 396), higher_is_better=True, percent=True)
    base, sr = found.costs
    assert (base.stage, sr.stage) == STAGES
    assert base.value == pytest.approx(0.2)
    assert sr.value == pytest.approx(0.04)
    assert sum(cost.value for cost in found.costs) == pytest.approx((396 - 300) / 400)
    assert found.worst is base
    assert found.is_clear
    assert found.sentence().startswith("base costs the most: 20 points of caption accuracy (16")
    assert "of the 24 that the cascade loses against real images (base 20, sr_64 4)" in found.sentence()


def test_the_interval_is_that_of_paired_differences():
    # 80 of 400 images are lost: the standard error of their share is sqrt(0.2 * 0.8 / 400) = 0.02
    base = judge("m", STAGES, shares(300, 380, 396), higher_is_better=True, percent=True).costs[0]
    assert base.low == pytest.approx(0.2 - 1.96 * 0.02, abs=0.004)
    assert base.high == pytest.approx(0.2 + 1.96 * 0.02, abs=0.004)


def test_what_chance_may_give_names_no_stage():
    few = judge("caption accuracy", STAGES, shares(37, 38, 39, count=40), higher_is_better=True, percent=True)
    assert not few.is_clear
    assert few.sentence().startswith("no stage stands out by caption accuracy")
    nothing = judge("caption accuracy", STAGES, shares(40, 40, 40, count=40), higher_is_better=True, percent=True)
    assert not nothing.is_clear
    assert nothing.sentence().startswith("no stage costs much by caption accuracy: the cascade loses 0 points")
    many = judge("caption accuracy", STAGES, shares(3800, 3900, 4000, count=4000), higher_is_better=True, percent=True)
    assert many.sentence().startswith("no stage costs much by caption accuracy: the cascade loses 5 points")


@pytest.mark.parametrize(
    ("margins", "start"),
    [
        ((1.0, 1.0, 0.0), "base costs the most"),
        ((1.0, 9.0, 0.0), "no stage stands out"),  # sr_64 may cost as much
        ((9.0, 1.0, 9.0), "no stage stands out"),
        ((None, 1.0, 0.0), "which stage costs the most by FID cannot be told without intervals"),
        ((1.0, None, 0.0), "which stage costs the most by FID cannot be told without intervals"),
        ((1.0, 1.0, None), "no stage stands out"),
    ],
)
def test_what_is_not_known_is_not_taken_for_certain(margins, start):
    qualities = [Quality(value, margin=margin) for value, margin in zip((12.0, 3.0, 0.0), margins)]
    assert judge("FID", STAGES, qualities, higher_is_better=False, percent=False).sentence().startswith(start)


def test_a_distance_costs_where_it_falls():
    qualities = [Quality(12.0, margin=1.5), Quality(3.0, margin=2.0), Quality(0.0, margin=0.0)]
    found = judge("FID", STAGES, qualities, higher_is_better=False, percent=False)
    base, sr = found.costs
    assert base.value == 9.0
    assert (base.low, base.high) == (6.5, 11.5)
    assert sr.value == 3.0
    assert found.sentence().startswith("base costs the most: 9 of FID (6.5 to 11.5) of the 12 that the cascade loses")


def test_one_quality_more_than_stages():
    with pytest.raises(ValueError, match="2 qualities for 2 stages"):
        judge("m", STAGES, shares(1, 2), higher_is_better=True, percent=False)
