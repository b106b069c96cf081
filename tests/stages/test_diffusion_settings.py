"""Learned variance, training times, tables, and guidance within an interval, in a stage."""

import inspect
import json

import pytest
import torch
from tiny_stages import SIZE, TEXT_DIM, base_stage, generators, make_batch, sr_stage, watch

from imagen_lightning.components import build
from imagen_lightning.diffusion import (
    P2,
    DiscreteSchedule,
    Epsilon,
    LearnedRange,
    LinearSchedule,
    LogitNormalTimes,
    LogNormalTimes,
    NoThresholding,
    SigmoidSchedule,
)
from imagen_lightning.diffusion.random import Stream, spread_uniform
from imagen_lightning.networks import UNet
from imagen_lightning.samplers import (
    DDIM,
    DDPM,
    DPMSolverPPSDE,
    Heun,
    KarrasTimes,
    LeadingTimes,
    LinspaceTimes,
    ListedTimes,
    TrailingTimes,
)
from imagen_lightning.stages import Diffusion, Sampling
from imagen_lightning.types import Denoised, InputError

CAPTIONS = ["a red star", "a dog"]
T = torch.tensor([0.3, 0.6])


class SixChannels(torch.nn.Module):
    """A U-Net whose answer has channels for the variance, made of the image's own."""

    out_channels, text_dim = 6, TEXT_DIM

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = UNet(dim=8, multipliers=[1], num_blocks=1, attention=[True], text_dim=TEXT_DIM, head_dim=8,
                            groups=4)  # fmt: skip
        self.raw = torch.nn.Conv2d(3, 3, 1)

    def forward(self, x_t, time, conditioning):
        output = self.network(x_t, time, conditioning)
        return torch.cat([output, self.raw(output)], dim=1)


def learned_stage(**changes):
    settings = {"diffusion": Diffusion(DiscreteSchedule("squaredcos_cap_v2"), Epsilon(), variance=LearnedRange())}
    return base_stage(SixChannels(), **{**settings, **changes})


@pytest.fixture
def x():
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


# ---- learned variance


def test_channels_of_the_network_must_agree():
    with pytest.raises(InputError, match=r"gives 6 channels; its stage takes 3.*LearnedRange"):
        base_stage(SixChannels())
    three = SixChannels()
    three.out_channels = 3
    with pytest.raises(InputError, match="gives 3 channels; its stage takes 6"):
        base_stage(three, diffusion=Diffusion(variance=LearnedRange()))


def test_both_halves_are_trained():
    stage = learned_stage()
    stage.training_step(make_batch(range(4)), 0).backward()
    assert stage.network.raw.weight.grad.abs().sum() > 0
    # with the bound at no weight the loss is that of the same network without channels for the variance
    stage = learned_stage(diffusion=Diffusion(variance=LearnedRange(0.0)))
    plain = base_stage(SixChannels().network)
    plain.network.load_state_dict(stage.network.network.state_dict())
    with torch.no_grad():
        assert torch.allclose(
            stage.training_step(make_batch(range(4)), 0), plain.training_step(make_batch(range(4)), 0)
        )
        # that of the defaults is larger by the bound's terms
        assert learned_stage(diffusion=Diffusion(variance=LearnedRange())).training_step(
            make_batch(range(4)), 0
        ) > stage.training_step(make_batch(range(4)), 0)


@torch.no_grad()
def test_samplers_get_the_variance_they_need(x):
    stage = learned_stage(sampling=Sampling(thresholding=NoThresholding())).eval()
    for guidance in (1.0, 3.0):
        plain = stage.denoiser(CAPTIONS, guidance=guidance)(x, T)
        learned = stage.denoiser(CAPTIONS, guidance=guidance, variance=True)(x, T)
        assert isinstance(plain, torch.Tensor)
        assert isinstance(learned, Denoised)
        assert torch.allclose(learned.x0, plain)
        # guided or not, the fraction is the conditional half's
        conditional = stage.denoiser(CAPTIONS, guidance=1.0, variance=True)(x, T).variance
        assert torch.allclose(learned.variance, conditional, atol=1e-5)


def test_sampling_with_learned_variance():
    stage = learned_stage()

    def draw(sampler):
        return stage.sample(CAPTIONS, generators(1, 2), num_steps=3, sampler=sampler)

    learned, small, large = (draw(DDPM(variance)) for variance in ("learned", "small", "large"))
    assert learned.isfinite().all()
    assert not torch.allclose(learned, small)
    assert not torch.allclose(learned, large)
    assert draw(DDIM()).shape == learned.shape
    with pytest.raises(InputError, match=r"diffusion.variance is no LearnedRange.*'small'"):
        base_stage().sample(CAPTIONS, generators(1, 2), num_steps=3, sampler=DDPM("learned"))


# ---- times


def times_of(stage, training=True):
    batch = make_batch(range(16))
    with torch.no_grad():
        stage.training_step(batch, 0) if training else stage.validation_step(batch, 0)
    return stage.record.times


@pytest.mark.parametrize("times", [LogitNormalTimes(0.5, 0.7), LogNormalTimes()])
def test_training_times_follow_their_distribution_and_validation_is_even(times):
    stage = base_stage(diffusion=Diffusion(times=times))
    even = spread_uniform(0, Stream.TIME, torch.arange(16))
    assert torch.equal(times_of(stage), times(even, stage.process.schedule))
    assert torch.equal(times_of(stage, training=False), even)


@pytest.mark.parametrize("training", [True, False])
def test_a_table_is_trained_and_validated_at_its_steps(training):
    stage, seen = base_stage(diffusion=Diffusion(DiscreteSchedule())), []
    stage.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    t = times_of(stage, training)
    (told,) = seen
    assert torch.equal(told, told.round())
    assert torch.equal(t, (told + 1) / 1000)
    assert torch.equal(told, (1000 * spread_uniform(0, Stream.TIME, torch.arange(16))).floor())


# ---- sampling


def test_guidance_acts_within_its_interval():
    sampling = Sampling(num_steps=4, guidance=3.0, guidance_interval=(0.2, 2.0), thresholding=NoThresholding())
    stage = base_stage(sampling=sampling)
    calls = watch(stage)
    stage.sample(CAPTIONS, generators(1, 2))
    levels = [float(torch.tan(t[0].double() * torch.pi / 2)) for _, t, _ in calls]
    assert [len(x) for x, _, _ in calls] == [4 if 0.2 < level <= 2 else 2 for level in levels]
    assert {len(x) for x, _, _ in calls} == {2, 4}


@torch.no_grad()
def test_outside_its_interval_guidance_is_one(x):
    sampling = Sampling(guidance_interval=[0.8, 5.0], thresholding=NoThresholding())
    stage, everywhere = base_stage(sampling=sampling).eval(), base_stage(sampling=Sampling()).eval()
    everywhere.sampling.thresholding = NoThresholding()
    guided = stage.denoiser(CAPTIONS, guidance=3.0)
    for time, weight in ((0.3, 1.0), (0.6, 3.0), (0.95, 1.0)):
        t = torch.full((2,), time)
        expected = everywhere.denoiser(CAPTIONS, guidance=weight)(x, t)
        assert torch.allclose(guided(x, t), expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match=r"guidance_interval from 2\.0 to 1\.0"):
        Sampling(guidance_interval=(2.0, 1.0))


@torch.no_grad()
def test_rescaled_guidance_has_the_spread_of_the_conditional(x):
    def estimate(guidance, rescale=0.0):
        sampling = Sampling(thresholding=NoThresholding(), guidance_rescale=rescale)
        return base_stage(sampling=sampling).eval().denoiser(CAPTIONS, guidance=guidance)(x, T)

    spread = estimate(1.0).flatten(1).std(1)
    assert not torch.allclose(estimate(9.0).flatten(1).std(1), spread, rtol=1e-2)
    assert torch.allclose(estimate(9.0, 1.0).flatten(1).std(1), spread, rtol=1e-4)
    assert torch.allclose(estimate(9.0, 0.7), 0.7 * estimate(9.0, 1.0) + 0.3 * estimate(9.0), atol=1e-4)
    with pytest.raises(InputError, match=r"guidance_rescale 1\.5"):
        Sampling(guidance_rescale=1.5)


@pytest.mark.parametrize("sampler", [DDIM(), Heun(), Heun(churn=2.0)])
def test_progress_is_told_once_a_step(sampler):
    stage, steps = base_stage(), []
    stage.sample(CAPTIONS, generators(1, 2), num_steps=5, sampler=sampler, on_step=lambda: steps.append(1))
    assert len(steps) == 5


SETTINGS = [
    (Diffusion(LinearSchedule(0.2, 10.0), Epsilon(), P2(0.5), LogitNormalTimes(0.1)), Sampling(DPMSolverPPSDE(15))),
    (Diffusion(SigmoidSchedule(0.0, 3.0, 0.7)), Sampling(Heun(2.0, 0.1, 9.0), spacing=KarrasTimes(0.01, 20.0))),
    (Diffusion(DiscreteSchedule([0.1, 0.2, 0.3, 0.4], 4)), Sampling(num_steps=2, spacing=LeadingTimes(1))),
    (Diffusion(DiscreteSchedule("squaredcos_cap_v2"), times=LogNormalTimes()), Sampling(spacing=TrailingTimes())),
    (Diffusion(DiscreteSchedule()), Sampling(spacing=LinspaceTimes(-5.1), guidance_interval=(0.1, 3.0))),
    (Diffusion(), Sampling(num_steps=27, spacing=ListedTimes("smart27"), guidance_rescale=0.7)),
]


@pytest.mark.parametrize(("diffusion", "sampling"), SETTINGS)
def test_settings_survive_as_plain_data(diffusion, sampling):
    stage = base_stage(diffusion=diffusion, sampling=sampling)
    arguments = json.loads(json.dumps(stage.hyperparameters(), allow_nan=False))
    again = build({"class_path": "imagen_lightning.stages.BaseStage", "init_args": arguments})
    assert again.hyperparameters() == stage.hyperparameters()
    again.load_state_dict(stage.state_dict())
    again.log = stage.log
    assert torch.equal(times_of(again), times_of(stage))
    assert torch.equal(*(each.sample(CAPTIONS, generators(1, 2)) for each in (again, stage)))


@pytest.mark.parametrize("make", [base_stage, sr_stage])
def test_a_setting_at_its_own_default_changes_no_other(make):
    """Walks every group of settings of both stages; a group that is given in part keeps the stage's defaults."""
    plain = make()
    told = json.dumps(plain.hyperparameters())
    walked = 0
    for group in ("diffusion", "augmentation", "sampling", "optimization", "execution"):
        if group not in inspect.signature(type(plain).__init__).parameters:
            continue
        kind = type(getattr(plain, group))
        for name, parameter in inspect.signature(kind.__init__).parameters.items():
            if parameter.default is parameter.empty:
                continue
            given = kind(**{name: parameter.default})
            stage = make(**{group: given})
            assert json.dumps(stage.hyperparameters()) == told, (group, name)
            assert vars(stage.optimization) == vars(plain.optimization)
            walked += 1
    assert walked > 20


@pytest.mark.parametrize(("make", "guidance"), [(base_stage, 3.0), (sr_stage, 1.0)])
def test_a_stages_own_guidance_stays_where_other_sampling_is_set(make, guidance):
    assert make(sampling=Sampling(num_steps=20)).sampling.guidance == guidance
    stage = make(sampling=Sampling(num_steps=20, guidance=2.0))
    assert stage.sampling.guidance == 2.0
    stage.sampling = Sampling(num_steps=7)
    assert (stage.sampling.num_steps, stage.sampling.guidance) == (7, guidance)
    assert stage.hyperparameters()["sampling"]["init_args"]["guidance"] == guidance


def test_a_learned_variance_of_another_chain_is_refused():
    for schedule, variance in (
        (DiscreteSchedule(num_steps=500), LearnedRange()),
        (DiscreteSchedule(), LearnedRange(num_steps=10)),
    ):
        numbers = (
            rf"DiscreteSchedule has num_steps {schedule.num_steps} and LearnedRange num_steps {variance.num_steps}"
        )
        with pytest.raises(InputError, match=numbers):
            Diffusion(schedule, variance=variance).process()
    Diffusion(DiscreteSchedule(num_steps=10), variance=LearnedRange(num_steps=10)).process()
    Diffusion(variance=LearnedRange(num_steps=10)).process()
