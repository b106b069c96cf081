import pytest
import torch

from imagen_lightning.diffusion import CosineSchedule, DiscreteSchedule, FlowSchedule, ShiftedCosineSchedule
from imagen_lightning.samplers import (
    DDIM,
    DDPM,
    DPMSolverPP,
    DPMSolverPPSDE,
    Heun,
    KarrasTimes,
    LeadingTimes,
    LinspaceTimes,
    ListedTimes,
    LogSNRTimes,
    TrailingTimes,
    UniformTimes,
)
from imagen_lightning.samplers.common import noise_like
from imagen_lightning.types import InputError

SAMPLERS = [DDIM(), DDIM(1.0), DDPM(), DPMSolverPP(), DPMSolverPPSDE()]
NOISY = [DDIM(1.0), DDPM(), DPMSolverPPSDE(), Heun(churn=2.0)]
SCHEDULE = CosineSchedule()


def half(x, t):
    return x / 2


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("sampler", [*SAMPLERS, Heun(), Heun(churn=1.0)])
@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([1.0], "at least two"),
        ([], "at least two"),
        ([0.0, 0.5, 1.0], "must decrease"),
        ([1.0, 0.5, 0.5, 0.0], "must decrease"),
        ([1.1, 0.5, 0.0], r"within \[0, 1\]"),
        ([0.5, -0.1], r"within \[0, 1\]"),
        ([1.0, float("nan"), 0.0], "must decrease"),
    ],
)
def test_bad_times(sampler, times, message):
    with pytest.raises(InputError, match=message):
        sampler(half, torch.zeros(1, 1, 2, 2), torch.tensor(times), schedule=SCHEDULE)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_denoise_is_called_once_a_step_with_one_time_an_image(sampler):
    times, seen = torch.linspace(1, 0, 6, dtype=torch.float64), []

    def denoise(x, t):
        seen.append(t)
        return half(x, t)

    x = torch.zeros(3, 1, 2, 2)
    assert sampler(denoise, x, times, schedule=SCHEDULE).shape == x.shape
    assert torch.allclose(torch.stack(seen), times[:-1, None].expand(5, 3).float())
    assert seen[0].dtype == torch.float32
    assert x.abs().max() == 0


def test_heun_evaluates_both_ends_of_a_step_but_the_last():
    times, seen = torch.linspace(1, 0, 5, dtype=torch.float64), []

    def denoise(x, t):
        seen.append(float(t[0]))
        return half(x, t)

    Heun()(denoise, torch.zeros(3, 1, 2, 2), times, schedule=SCHEDULE)
    assert seen == [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    assert Heun.evaluations_per_step == 2


@pytest.mark.parametrize("sampler", NOISY)
def test_an_images_noise_does_not_depend_on_the_batch(sampler):
    x, times = torch.randn(4, 3, 5, 5), UniformTimes()(6, SCHEDULE)

    def run(part, seeds):
        return sampler(half, part, times, schedule=SCHEDULE, generator=generators(*seeds))

    whole = run(x, (1, 2, 3, 4))
    assert torch.equal(torch.cat([run(x[:1], (1,)), run(x[1:], (2, 3, 4))]), whole)
    assert torch.equal(run(x.flip(0), (4, 3, 2, 1)).flip(0), whole)
    assert not torch.equal(run(x, (1, 2, 3, 5))[3], whole[3])
    assert not torch.equal(run(x[:1].expand(2, -1, -1, -1), (1, 2))[0], run(x[:1].expand(2, -1, -1, -1), (1, 2))[1])


def test_one_generator_serves_the_whole_batch():
    x = torch.zeros(4, 3, 2, 2)
    (generator,) = generators(7)
    assert torch.equal(noise_like(x, generator), torch.randn(x.shape, generator=generators(7)[0]))
    assert not torch.equal(noise_like(x, generators(7)[0]), noise_like(x, generator))


@pytest.mark.parametrize("sampler", NOISY)
@pytest.mark.parametrize("count", [1, 3])
def test_the_number_of_generators_must_be_that_of_the_images(sampler, count):
    with pytest.raises(InputError, match=f"{count} generators for 2 images"):
        sampler(
            half, torch.zeros(2, 1, 2, 2), UniformTimes()(3, SCHEDULE), schedule=SCHEDULE,
            generator=generators(*range(count)),
        )  # fmt: skip


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_eta_out_of_range(eta):
    with pytest.raises(InputError, match="eta"):
        DDIM(eta)


def test_unknown_variance():
    with pytest.raises(InputError, match="'medium'"):
        DDPM("medium")


@pytest.mark.parametrize("num_steps", [1, 2, 7])
@pytest.mark.parametrize("schedule", [CosineSchedule(), ShiftedCosineSchedule(256), FlowSchedule()])
def test_spacings(num_steps, schedule):
    times = UniformTimes()(num_steps, schedule)
    assert times.tolist() == pytest.approx([1 - i / num_steps for i in range(num_steps + 1)])
    even = LogSNRTimes(-5.0, 7.0)(num_steps, schedule)
    for spacing in (times, even):
        assert spacing.dtype == torch.float64
        assert len(spacing) == num_steps + 1
        assert (spacing.diff() < 0).all()
        assert spacing[-1] == 0
    levels = schedule.log_snr(even[:-1])
    assert levels[0] == pytest.approx(-5)
    if num_steps > 1:
        assert levels[-1] == pytest.approx(7)
        assert levels.diff().tolist() == pytest.approx([12 / (num_steps - 1)] * (num_steps - 1))


def test_bad_spacings():
    class Table:
        log_snr = None

    for spacing in (UniformTimes(), LogSNRTimes(), KarrasTimes(), LeadingTimes(), LinspaceTimes(), TrailingTimes()):
        with pytest.raises(InputError, match="0 sampling steps"):
            spacing(0, SCHEDULE)
    with pytest.raises(InputError, match="low 3"):
        LogSNRTimes(3.0, 3.0)
    for spacing in (LogSNRTimes(), KarrasTimes()):
        with pytest.raises(InputError, match="Table has none"):
            spacing(5, Table())
    with pytest.raises(InputError, match=r"Heun's churn needs .* Table has none"):
        Heun(churn=1.0)(half, torch.zeros(1, 1, 2, 2), torch.tensor([1.0, 0.0]), schedule=Table())


def test_karras_times_are_edms():
    # Karras et al. 2022, eq. 5, in sigma / alpha
    for schedule in (SCHEDULE, FlowSchedule(), DiscreteSchedule()):
        times = KarrasTimes(0.02, 50.0, 5.0)(4, schedule)
        assert times[-1] == 0
        expected = [(50**0.2 + i / 3 * (0.02**0.2 - 50**0.2)) ** 5 for i in range(4)]
        assert (schedule.sigma(times) / schedule.alpha(times))[:-1].tolist() == pytest.approx(expected)
    with pytest.raises(InputError, match=r"sigma_max 1000\.0 is beyond the schedule's end, 157"):
        KarrasTimes(sigma_max=1000.0)(4, DiscreteSchedule())
    with pytest.raises(InputError, match=r"sigma_min 3\.0"):
        KarrasTimes(3.0, 2.0)


@pytest.mark.parametrize("spacing", [LeadingTimes(), LinspaceTimes(), TrailingTimes()])
def test_steps_of_a_table(spacing):
    short = DiscreteSchedule("squaredcos_cap_v2", num_steps=50)
    for schedule, size in ((short, 50), (SCHEDULE, 1000)):
        times = spacing(20, schedule)
        assert len(times) == 21
        assert (times.diff() < 0).all()
        assert torch.allclose(times * size, (times * size).round())
    with pytest.raises(InputError, match=r"60 sampling steps .* table of 50; take fewer"):
        spacing(60, short)


def test_lists_of_steps():
    steps = [9, 4, 1]
    assert ListedTimes(steps)(3, SCHEDULE).tolist() == pytest.approx([0.01, 0.005, 0.002, 0.0])
    assert ListedTimes(steps)(3, DiscreteSchedule(num_steps=10)).tolist() == pytest.approx([1.0, 0.5, 0.2, 0.0])
    with pytest.raises(InputError, match="has 27, not 50; set the number of steps to 27"):
        ListedTimes("fast27")(50, SCHEDULE)
    with pytest.raises(InputError, match="do not fit a table of 8"):
        ListedTimes(steps)(3, DiscreteSchedule(num_steps=8))
    with pytest.raises(InputError, match=r"'fast28'; there are fast27, smart27"):
        ListedTimes("fast28")
    for steps in ([], [1, 2], [2, 2]):
        with pytest.raises(InputError, match="must decrease"):
            ListedTimes(steps)


def test_settings_of_samplers_and_spacings_that_cannot_be():
    for make, message in [
        (lambda: Heun(churn=-1.0), "churn -1"),
        (lambda: Heun(1.0, 2.0, 1.0), r"from 2\.0 to 1\.0"),
        (lambda: DPMSolverPP(-1), "lower_order_below -1"),
        (lambda: DPMSolverPPSDE(-1), "lower_order_below -1"),
        (lambda: LeadingTimes(-1), "offset -1"),
        (lambda: LinspaceTimes(lambda_min=9.0)(5, SCHEDULE), r"lambda_min 9\.0"),
    ]:
        with pytest.raises(InputError, match=message):
            make()
