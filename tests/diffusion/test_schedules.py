import math

import pytest
import torch

from imagen_lightning.diffusion import CosineSchedule, FlowSchedule, ShiftedCosineSchedule
from imagen_lightning.diffusion.schedules import LOG_SNR_MIN
from imagen_lightning.types import InputError

SCHEDULES = [
    CosineSchedule(),
    ShiftedCosineSchedule(256),
    ShiftedCosineSchedule(16),
    ShiftedCosineSchedule(32, reference_size=256),
    FlowSchedule(),
]
COSINES = SCHEDULES[:4]
INNER = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
WHOLE = torch.linspace(0, 1, 1001, dtype=torch.float64)


@pytest.mark.parametrize("schedule", COSINES)
def test_cosines_preserve_variance(schedule):
    assert torch.allclose(
        schedule.alpha(WHOLE) ** 2 + schedule.sigma(WHOLE) ** 2, torch.ones(1001).double(), atol=1e-15
    )


def test_cosine_is_the_textbook_cosine():
    schedule = CosineSchedule()
    for t in (0.0, 0.1, 0.5, 0.77, 0.999):
        exact = torch.tensor(t, dtype=torch.float64)
        assert float(schedule.alpha(exact)) == pytest.approx(math.cos(math.pi * t / 2), abs=1e-15)
        assert float(schedule.sigma(exact)) == pytest.approx(math.sin(math.pi * t / 2), abs=1e-15)


def test_flow_is_the_straight_line():
    assert torch.equal(FlowSchedule().alpha(INNER), 1 - INNER)
    assert torch.equal(FlowSchedule().sigma(WHOLE), WHOLE)


@pytest.mark.parametrize(("image_size", "reference_size"), [(256, 64), (16, 64), (1024, 64), (64, 64), (32, 256)])
def test_shift_moves_the_log_snr_by_the_ratio_of_sizes(image_size, reference_size):
    shifted = ShiftedCosineSchedule(image_size, reference_size).log_snr(INNER)
    expected = CosineSchedule().log_snr(INNER) + 2 * math.log(reference_size / image_size)
    inside = expected > LOG_SNR_MIN
    assert inside.sum() > 990
    assert torch.allclose(shifted[inside], expected[inside], rtol=0, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_log_snr_is_that_of_alpha_and_sigma_and_falls(schedule):
    expected = torch.log(schedule.alpha(INNER) ** 2 / schedule.sigma(INNER) ** 2)
    assert torch.allclose(schedule.log_snr(INNER), expected, rtol=0, atol=1e-9)
    assert (schedule.log_snr(INNER).diff() < 0).all()
    assert (schedule.alpha(WHOLE).diff() <= 0).all()
    assert (schedule.sigma(WHOLE).diff() >= 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_time_at_inverts_log_snr(schedule):
    assert torch.allclose(schedule.time_at(schedule.log_snr(INNER)), INNER, rtol=0, atol=1e-12)
    levels = torch.linspace(-15, 15, 61, dtype=torch.float64)
    assert torch.allclose(schedule.log_snr(schedule.time_at(levels)), levels, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ends(schedule, dtype):
    data, noise = torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)
    assert schedule.alpha(data) == 1
    assert schedule.sigma(data) == 0
    assert schedule.log_snr(data) == math.inf
    assert schedule.alpha(noise) > 0
    assert float(schedule.sigma(noise)) == pytest.approx(1, abs=1e-8)
    # float32 knows an angle near pi / 2 to 1e-7, hence alpha = 4.5e-5 to a part in a thousand
    assert float(schedule.log_snr(noise)) == pytest.approx(LOG_SNR_MIN, abs=1e-6 if dtype == torch.float64 else 5e-3)


def test_network_time():
    for schedule in SCHEDULES:
        assert torch.equal(schedule.network_time(WHOLE), 1000 * WHOLE)


def test_sizes_must_be_positive():
    with pytest.raises(InputError, match="image_size 0"):
        ShiftedCosineSchedule(0)
    with pytest.raises(InputError, match="reference_size -64"):
        ShiftedCosineSchedule(64, -64)
