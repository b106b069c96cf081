import math

import pytest
import torch
from scipy import stats

from imagen_lightning.diffusion import (
    CosineSchedule,
    DiffusionProcess,
    DiscreteSchedule,
    EvenTimes,
    FlowSchedule,
    LogitNormalTimes,
    LogNormalTimes,
    Plain,
    V,
)
from imagen_lightning.diffusion.random import Stream, spread_uniform
from imagen_lightning.types import InputError

U = spread_uniform(0, Stream.TIME, torch.arange(20_000))


def test_even_times_are_the_numbers_themselves():
    assert torch.equal(EvenTimes()(U, CosineSchedule()), U)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.7, 0.5), (1.5, 2.0)])
def test_logit_normal(mean, std):
    t = LogitNormalTimes(mean, std)(U, FlowSchedule()).double()
    assert 0 < t.min() < t.max() < 1
    logits = torch.log(t / (1 - t))
    # spread numbers fill the distribution far more evenly than 20,000 draws, whose distance would be some 0.006
    assert stats.kstest(logits.numpy(), "norm", (mean, std)).statistic < 1e-3


@pytest.mark.parametrize("schedule", [CosineSchedule(), FlowSchedule()])
@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.5, 0.8)])
def test_log_normal_is_edms_distribution_of_the_noise_level(schedule, mean, std):
    t = LogNormalTimes(mean, std)(U, schedule).double()
    log_sigma = torch.log(schedule.sigma(t) / schedule.alpha(t))
    assert stats.kstest(log_sigma.numpy(), "norm", (mean, std)).statistic < 1e-3


def test_a_table_trains_its_steps_with_the_distributions_shares():
    schedule = DiscreteSchedule("squaredcos_cap_v2")
    process = DiffusionProcess(schedule, V(), Plain(), LogNormalTimes())
    t = process.training_times(U)
    steps = schedule.network_time(t)
    assert torch.equal(steps, steps.round())
    assert torch.equal(t, (steps + 1) / 1000)
    # as many at or below a step as have a noise level at or below the step's
    for k in (200, 500, 800):
        time = torch.tensor((k + 1) / 1000, dtype=torch.float64)
        log_sigma = math.log(schedule.sigma(time) / schedule.alpha(time))
        assert float((steps <= k).float().mean()) == pytest.approx(stats.norm(-1.2, 1.2).cdf(log_sigma), abs=2e-3)


def test_noise_beyond_the_schedule_is_its_end():
    schedule = DiscreteSchedule()
    end = -float(schedule.log_snr(torch.ones((), dtype=torch.float64))) / 2
    t = LogNormalTimes(4.5, 1.0)(U, schedule)
    assert float((t == 1).float().mean()) == pytest.approx(stats.norm(4.5, 1).sf(end), abs=1e-3)


def test_times_that_cannot_be():
    class Closed:
        pass

    with pytest.raises(InputError, match="Closed has none"):
        LogNormalTimes()(U, Closed())
    for times in (LogitNormalTimes, LogNormalTimes):
        with pytest.raises(InputError, match="std 0"):
            times(std=0.0)
