"""Which fields of a scheduler's config are followed, passed over, or refused."""

import warnings

import pytest
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from if_shapes import PUBLISHED

from imagen_lightning.components import describe
from imagen_lightning.export.diffusers_scheduler import (
    DDPM_DEFAULTS,
    DPM_DEFAULTS,
    REQUIRED,
    read_noising,
    read_scheduler,
)
from imagen_lightning.types import InputError

DEFAULTS = {"DDPMScheduler": DDPM_DEFAULTS, "DPMSolverMultistepScheduler": DPM_DEFAULTS}
OTHER = {"DDPMScheduler": DPM_DEFAULTS, "DPMSolverMultistepScheduler": DDPM_DEFAULTS}


def read(config, kind=None):
    """What is read of a config, as plain data, and the lines that are said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        settings = read_scheduler({**config, **({"_class_name": kind} if kind else {})}, "the scheduler")
    return {name: describe(part) for name, part in vars(settings).items()}, [str(each.message) for each in said]


def published(kind):
    """DeepFloyd IF's published config without the fields that the class does not read."""
    return {key: value for key, value in PUBLISHED.items() if key in DEFAULTS[kind]}


def test_the_published_config_is_read_and_its_unread_field_is_told():
    settings, said = read(PUBLISHED, "DDPMScheduler")
    assert said == ["the scheduler: DDPMScheduler does not read lambda_min_clipped; passed over"]
    assert (settings, []) == read(published("DDPMScheduler"), "DDPMScheduler")
    with pytest.warns(UserWarning, match="the noising: DDPMScheduler does not read lambda_min_clipped"):
        read_noising({**PUBLISHED, "_class_name": "DDPMScheduler"}, "the noising")


@pytest.mark.parametrize("kind", DEFAULTS)
def test_fields_that_a_class_does_not_read_change_nothing(kind):
    wanted, said = read(published(kind), kind)
    assert said == []
    names = [*(OTHER[kind].keys() - DEFAULTS[kind].keys()), "a_new_field"]
    for name in names:
        for value in (None, 7, "karras", True, -5.1):
            settings, said = read({**published(kind), name: value}, kind)
            assert settings == wanted
            assert said == [f"the scheduler: {kind} does not read {name}; passed over"]


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, known in DEFAULTS.items() for name in REQUIRED if name in known]
)
def test_fields_that_change_the_samples_stay_refused(kind, name):
    with pytest.raises(InputError, match=f"{name} 'another'"):
        read({**published(kind), name: "another"}, kind)


def test_a_field_that_earlier_schedulers_read_is_refused_where_it_changes_the_samples():
    assert read({**published("DDPMScheduler"), "predict_epsilon": True}, "DDPMScheduler")[1] == []
    with pytest.raises(InputError, match=r"predict_epsilon False \(True\)"):
        read({**published("DDPMScheduler"), "predict_epsilon": False}, "DDPMScheduler")


def test_diffusers_own_round_trips_are_read_alike():
    first = DDPMScheduler.from_config({**PUBLISHED, "_class_name": "DDPMScheduler"})
    solver = DPMSolverMultistepScheduler.from_config(first.config)
    again = DDPMScheduler.from_config(solver.config)
    wanted, _ = read(published("DDPMScheduler"), "DDPMScheduler")
    solved, _ = read({**dict(solver.config), "_class_name": "DPMSolverMultistepScheduler"})
    assert solved["spacing"]["init_args"] == {"lambda_min": -5.1}
    for scheduler in (first, again):
        settings, _ = read({**dict(scheduler.config), "_class_name": "DDPMScheduler"})
        assert {**settings, "spacing": None} == {**wanted, "spacing": None}
    once_more = DPMSolverMultistepScheduler.from_config(again.config)
    assert read({**dict(once_more.config), "_class_name": "DPMSolverMultistepScheduler"})[0] == solved
