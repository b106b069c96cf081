"""Sampling of one stage: guidance, seeds, batches."""

import pytest
import torch
from tiny_stages import base_stage, generators, sr_stage, text_settings, watch

from imagen_lightning.diffusion import FlowSchedule, NoThresholding
from imagen_lightning.samplers import DDPM, DPMSolverPP, Heun, LogSNRTimes
from imagen_lightning.stages import Diffusion, Sampling
from imagen_lightning.types import Conditioning, InputError, NonFiniteSamples, Text

CAPTIONS = ["a red star", "a large blue circle above a square", "rain"]
OPEN = Sampling(thresholding=NoThresholding())
T = torch.tensor([0.3, 0.6, 0.9])


@pytest.fixture
def x():
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def near(first, second):
    return torch.allclose(first, second, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("null_text", ["zero", "learned", "empty_caption"])
def test_guidance_moves_away_from_the_null_text(null_text, x):
    stage = base_stage(text=text_settings(null_text=null_text), sampling=OPEN).eval()
    null = stage.null(torch.device("cpu"))
    text = Text(null.states.expand(3, -1, -1), null.mask.expand(3, -1), null.pooled.expand(3, -1))
    without = stage.process.x0(stage.predict(x, T, Conditioning(text)), x, T)
    text = stage.text.encoder(CAPTIONS)
    with_text = stage.process.x0(stage.predict(x, T, Conditioning(text)), x, T)
    assert not near(with_text, without)
    assert near(stage.denoiser(CAPTIONS, guidance=1.0)(x, T), with_text)
    assert near(stage.denoiser(CAPTIONS, guidance=0.0)(x, T), without)
    assert near(stage.denoiser(CAPTIONS, guidance=3.0)(x, T), without + 3 * (with_text - without))


@torch.no_grad()
def test_a_negative_prompt_takes_the_place_of_the_null_text(x):
    stage = base_stage(sampling=OPEN).eval()
    negative = ["a dog on a very long long mat", "a", "b c"]
    with_text, without = (stage.denoiser(captions, guidance=1.0)(x, T) for captions in (CAPTIONS, negative))
    guided = stage.denoiser(CAPTIONS, guidance=3.0, negative=negative)(x, T)
    assert near(guided, without + 3 * (with_text - without))
    assert not near(guided, stage.denoiser(CAPTIONS, guidance=3.0)(x, T))
    images = [
        stage.sample(CAPTIONS, generators(1, 2, 3), guidance=3.0, num_steps=3, negative=text)
        for text in (negative, None)
    ]
    assert not near(*images)


@torch.no_grad()
def test_thresholding_follows_guidance(x):
    stage = base_stage().eval()
    free = base_stage(sampling=OPEN).eval().denoiser(CAPTIONS, guidance=9.0)(x, T)
    assert free.abs().max() > 1
    assert near(stage.denoiser(CAPTIONS, guidance=9.0)(x, T), free.clamp(-1, 1))


def draw(stage, captions, seeds, **options):
    low_res = None
    if hasattr(stage, "low_res_size"):
        low_res = [2 * torch.rand(1, 3, 4, 4, generator=g) - 1 for g in generators(*seeds)]
        options["low_res"] = torch.cat(low_res)
    return stage.sample(captions, generators(*seeds), num_steps=4, **options)


@pytest.mark.parametrize("make", [base_stage, sr_stage])
@pytest.mark.parametrize("sampler", [DDPM(), DPMSolverPP(), None])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_an_image_does_not_depend_on_its_batch(make, sampler, guidance):
    stage = make()
    calls = watch(stage)
    options = {"sampler": sampler, "guidance": guidance}
    whole = draw(stage, CAPTIONS, (1, 2, 3), **options)
    passes = 2 if guidance != 1 else 1
    assert [len(x) for x, _, _ in calls] == [3 * passes] * 4
    first = calls[0]
    calls.clear()
    parts = [draw(stage, CAPTIONS[i : i + 1], (i + 1,), **options) for i in range(3)]
    assert whole.shape == (3, 3, 8, 8)
    assert whole.abs().max() <= 1
    assert near(torch.cat(parts), whole)
    begun = calls[::4]  # the noise is the same to the bit, that on the low-resolution image too
    assert torch.equal(torch.cat([x[:1] for x, _, _ in begun]), first[0][:3])
    if first[2].low_res is not None:
        assert torch.equal(torch.cat([conditioning.low_res[:1] for _, _, conditioning in begun]), first[2].low_res[:3])
    assert torch.equal(draw(stage, CAPTIONS, (1, 2, 3), **options), whole)
    assert not near(draw(stage, CAPTIONS, (4, 2, 3), **options)[0], whole[0])


@pytest.mark.parametrize("make", [base_stage, sr_stage])
def test_captions_matter_where_there_is_guidance_or_none(make):
    for guidance in (1.0, 3.0):
        first = draw(make(), CAPTIONS, (1, 1, 1), guidance=guidance)
        second = draw(make(), CAPTIONS[::-1], (1, 1, 1), guidance=guidance)
        assert near(first, second.flip(0))
        assert not near(first, second)


def test_settings_of_the_stage_hold_where_none_are_given():
    stage = base_stage(sampling=Sampling(DPMSolverPP(), num_steps=5, guidance=1.0, spacing=LogSNRTimes()))
    calls, steps = watch(stage), []
    stage.sample(CAPTIONS, generators(1, 2, 3), on_step=lambda: steps.append(1))
    expected = LogSNRTimes()(5, stage.process.schedule)[:-1]
    assert torch.allclose(torch.stack([t[0] for _, t, _ in calls]).double(), expected, atol=1e-6)
    assert [len(x) for x, _, _ in calls] == [3] * 5
    assert len(steps) == 5
    steps.clear()
    stage.sample(CAPTIONS, generators(1, 2, 3), num_steps=2, guidance=2.0, on_step=lambda: steps.append(1))
    assert len(steps) == 2
    assert len(calls[-1][0]) == 6


def test_text_is_encoded_once():
    stage, count = base_stage(), []
    encoder = stage.text.encoder
    stage.text.encoder = type(
        "Counted", (), {"dim": encoder.dim, "__call__": lambda self, *a: count.append(1) or encoder(*a)}
    )()
    stage.network.mid_attention.text_to_kv.register_forward_hook(lambda *args: count.append("kv"))
    stage.sample(CAPTIONS, generators(1, 2, 3), num_steps=6, guidance=2.0)
    assert count == [1, "kv"]


def test_sampling_leaves_the_stage_as_it_was():
    stage = base_stage()
    images = stage.sample(CAPTIONS, generators(1, 2, 3), num_steps=1)
    assert stage.training
    assert not images.requires_grad
    stage.eval()
    stage.sample(CAPTIONS, generators(1, 2, 3), num_steps=1)
    assert not stage.training
    torch.manual_seed(0)
    state = torch.get_rng_state()
    stage.sample(CAPTIONS, generators(1, 2, 3), num_steps=2, sampler=DDPM())
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_off():
    stage = base_stage()
    for module in stage.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.9
    images = [stage.sample(CAPTIONS, generators(1, 2, 3), num_steps=2) for _ in range(2)]
    assert torch.equal(*images)


def test_one_generator_an_image():
    with pytest.raises(InputError, match="2 generators for 3 images"):
        base_stage().sample(CAPTIONS, generators(1, 2), num_steps=1)


def test_flow_samples_too():
    stage = base_stage(diffusion=Diffusion(FlowSchedule()))
    assert stage.sample(CAPTIONS, generators(1, 2, 3), num_steps=3).isfinite().all()


@pytest.mark.parametrize(("make", "name"), [(base_stage, "base"), (sr_stage, "sr_8")])
@pytest.mark.parametrize("sampler", [None, DDPM(), DPMSolverPP(), Heun()])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_that_are_not_finite_are_refused_by_stage_and_step(make, name, sampler, value):
    stage = make(sampling=OPEN)
    calls, predict = 0, stage.predict
    bad_call = 1 + 2 * (2 if isinstance(sampler, Heun) else 1)  # the first of step 3

    def broken(x_t, t, conditioning):
        nonlocal calls
        calls += 1
        output = predict(x_t, t, conditioning).clone()
        if calls == bad_call:
            output[1] = value
        return output

    stage.predict = broken
    with pytest.raises(NonFiniteSamples) as error:
        draw(stage, CAPTIONS, (1, 2, 3), sampler=sampler, guidance=1.0)
    assert f"stage {name!r} gave NaN or infinite values at step 3 of 4, in 1 of 3 images" in str(error.value)
    assert error.value.bad.tolist() == [False, True, False]
