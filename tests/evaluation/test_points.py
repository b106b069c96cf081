"""Operating points: combinations, refusals, and those that no other beats."""

import pytest

from imagen_lightning.errors import InputError
from imagen_lightning.evaluation.points import Axes, best_point, pareto, points


def described(chosen):
    return [tuple((setting.guidance, setting.steps, setting.aug_level) for setting in point) for point in chosen]


def test_no_axes_are_the_cascade_s_own_settings(cascade):
    assert described(points(cascade, Axes())) == [((2.0, 3, None), (1.0, 2, 0.1))]


def test_every_combination_the_base_s_varying_slowest(cascade):
    axes = Axes({"aug_level": {"": [0.0, 0.2]}, "guidance": {"base": [1.0, 3.0]}})
    assert axes.num_points == 4
    assert described(points(cascade, axes)) == [
        ((1.0, 3, None), (1.0, 2, 0.0)),
        ((1.0, 3, None), (1.0, 2, 0.2)),
        ((3.0, 3, None), (1.0, 2, 0.0)),
        ((3.0, 3, None), (1.0, 2, 0.2)),
    ]


def test_one_value_for_all_stages(cascade):
    chosen = points(cascade, Axes({"steps": {"": [1, 4]}, "sampler": {"": ["ddpm"]}}))
    assert [[setting.steps for setting in point] for point in chosen] == [[1, 1], [4, 4]]
    assert {type(setting.sampler).__name__ for point in chosen for setting in point} == {"DDPM"}


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"temperature": {"": [1]}}, "temperature"),
        ({"guidance": {"sr_1024": [1.0]}}, "'sr_1024' is unknown; the cascade has base, sr_16"),
        ({"aug_level": {"base": [0.1]}}, "'base' takes no low-resolution image"),
        ({"steps": {"": [1], "base": [2]}}, "for all stages and for"),
        ({"aug_level": {"sr_16": [2.0]}}, "aug_level 2.0"),
        ({"sampler": {"base": ["magic"]}}, "magic"),
    ],
)
def test_refusals(cascade, axes, words):
    with pytest.raises(InputError, match=words):
        points(cascade, Axes(axes))


def test_pareto():
    assert pareto([1.0, 2.0, 3.0, 3.0, 0.5], [1.0, 2.0, 2.0, 5.0, 0.1]) == [0, 2, 4]
    assert pareto([1.0, 1.0], [1.0, 1.0]) == [0, 1]  # equals do not beat each other


def test_of_equal_points_the_cheaper_one_is_the_best(cascade):
    found = [
        tuple(cascade.settings(steps=[steps, None], guidance=[weight, None]))
        for steps, weight in ((4, 1), (3, 1), (3, 2))
    ]
    assert best_point([1.0, 1.0, 1.0], found) == 1
    assert best_point([1.0, 0.9, 1.0], found) == 0
    assert best_point([0.5, 0.9, 1.0], found) == 2
