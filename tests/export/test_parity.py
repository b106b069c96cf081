"""Whole sampling runs of imported stages against IFPipeline and IFSuperResolutionPipeline."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, IFPipeline, IFSuperResolutionPipeline

from imagen_lightning.export.import_pipelines import import_pipelines
from imagen_lightning.samplers import DDPM, DPMSolverPP

PROMPTS = ["A Photo of a kangaroo, wearing an orange hoodie", "an anime turtle"]
TOLERANCE = 1e-4


def generators(seed=5):
    return [torch.Generator().manual_seed(seed + number) for number in range(len(PROMPTS))]


def images(size):
    return 2 * torch.rand(len(PROMPTS), 3, size, size, generator=torch.Generator().manual_seed(3)) - 1


def load(folder, solver):
    """The pipeline, and the stage that its folder becomes."""
    kind = IFSuperResolutionPipeline if "stage-II" in folder.name else IFPipeline
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if solver:
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, lambda_min_clipped=-5.1)
        folder = folder.with_name(folder.name + "-solver")
        if not folder.exists():
            pipeline.save_pretrained(folder)
    return pipeline, import_pipelines([folder], low_res_size=pipeline.unet.config.sample_size // 4).stages[0]


def theirs(pipeline, steps, guidance, low_res=None):
    given = {} if low_res is None else {"image": low_res, "noise_level": 250}
    return pipeline(
        prompt=PROMPTS,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators(),
        clean_caption=False,
        output_type="pt",
        **given,
    ).images


def ours(stage, steps, guidance, prompts=PROMPTS, low_res=None, noise_level=250):
    given = {} if low_res is None else {"low_res": low_res, "aug_level": noise_level / 1000}
    return stage.sample(prompts, generators(), num_steps=steps, guidance=guidance, **given)


def compare(capsys, saved, name, solver, steps):
    pipeline, stage = load(saved(name), solver)
    assert isinstance(stage.sampling.sampler, DPMSolverPP if solver else DDPM)
    guidance = stage.sampling.guidance
    low_res = images(stage.low_res_size) if name.endswith("II") else None
    expected = theirs(pipeline, steps, guidance, low_res)
    found = ours(stage, steps, guidance, low_res=low_res)
    difference = moved(found, expected)
    with capsys.disabled():
        how = "DPM-Solver++" if solver else "DDPM, learned variance"
        print(f"\n{name}, {stage.image_size} px, {how}, {steps} steps, guidance {guidance:g}: {difference:.1e}")
    assert found.shape == expected.shape
    assert expected.std() > 0.1
    assert difference <= TOLERANCE
    return stage, low_res


def moved(one, other):
    return float((one - other).abs().max())


def check_that_all_counts(stage, low_res):
    """What the two programs agree on depends on each input by far more than they differ."""
    guidance = stage.sampling.guidance
    image = ours(stage, 3, guidance, low_res=low_res)
    other = ["a red star", "a house"]
    changes = {"text": ours(stage, 3, guidance, other, low_res), "guidance": ours(stage, 3, 1.5, low_res=low_res)}
    if low_res is not None:
        changes["low_res"] = ours(stage, 3, guidance, low_res=low_res.flip(3))
        changes["level and its noise"] = ours(stage, 3, guidance, low_res=low_res, noise_level=600)
        noised, level = stage.prepare_low_res(low_res, 0.25, generators(), torch.device("cpu"))
        stage.prepare_low_res = lambda *_: (noised, level + 0.5)
        changes["level alone"] = ours(stage, 3, guidance, low_res=low_res)
    for what, changed in changes.items():
        assert moved(image, changed) > 50 * TOLERANCE, what


@pytest.mark.parametrize("solver", [False, True], ids=["ddpm", "dpm-solver++"])
@pytest.mark.parametrize("name", ["stage I", "stage II"])
def test_fixture_shapes(capsys, saved, name, solver):
    stage, low_res = compare(capsys, saved, name, solver, 10)
    if not solver:
        check_that_all_counts(stage, low_res)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "solver", "steps"),
    [("stage I", False, 100), ("stage I", True, 50), ("stage II", False, 50), ("stage II", True, 25)],
)
def test_fixture_shapes_at_the_pipelines_own_steps(capsys, saved, name, solver, steps):
    compare(capsys, saved, name, solver, steps)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [False, True], ids=["ddpm", "dpm-solver++"])
@pytest.mark.parametrize("name", ["larger stage I", "larger stage II"])
def test_larger_shapes(capsys, saved, name, solver):
    stage, low_res = compare(capsys, saved, name, solver, 20)
    if not solver:
        check_that_all_counts(stage, low_res)


def cosine_tables(scheduler):
    """A scheduler's tables from its own formula in float64; its float32 ones are off by 1e-7."""
    bar = [math.cos((step / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(1001)]
    betas = [min(1 - after / before, 0.999) for before, after in pairwise(bar)]
    scheduler.betas = torch.tensor(betas, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    scheduler.one = torch.ones((), dtype=torch.float64)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield torch.float64
    torch.set_default_dtype(torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage I", "stage II"])
def test_ten_times_the_output_in_float64(capsys, saved, name, float64):
    """What parts the programs in float32 is rounding: in float64, and a larger epsilon, they agree to 1e-6."""
    torch.set_default_dtype(torch.float32)
    pipeline, stage = load(saved(name, gain=0.1), False)
    states, empty = pipeline.encode_prompt(PROMPTS, clean_caption=False)
    torch.set_default_dtype(float64)
    low_res = images(stage.low_res_size) if name.endswith("II") else None
    pipeline.text_encoder = pipeline.tokenizer = None  # it would ask for states of its own type
    pipeline.unet.to(float64)
    cosine_tables(pipeline.scheduler)
    given = {}
    if low_res is not None:
        cosine_tables(pipeline.image_noising_scheduler)
        level = pipeline.unet.class_embedding  # is given its features in float32
        level.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(float64), *inputs[1:]))
        given = {"image": low_res, "noise_level": 250}
    guidance = stage.sampling.guidance
    expected = pipeline(
        prompt_embeds=states.to(float64),
        negative_prompt_embeds=empty.to(float64),
        num_inference_steps=20,
        guidance_scale=guidance,
        generator=generators(),
        output_type="pt",
        **given,
    ).images
    difference = moved(ours(stage.to(float64), 20, guidance, low_res=low_res), expected)
    with capsys.disabled():
        print(f"\n{name}, float64, output scaled to 0.1, 20 steps, guidance {guidance:g}: {difference:.1e}")
    assert expected.dtype == float64
    assert difference <= 1e-6


@pytest.mark.filterwarnings("ignore:.*captions so far were cut")
def test_text_is_encoded_alike(saved):
    pipeline, stage = load(saved("stage I"), False)
    prompts = ["  A Photo of TWO cats ", "", "straße, ÉTÉ & 3 red stars!", "a very long prompt of stars, " * 30]
    states, empty = pipeline.encode_prompt(prompts, clean_caption=False)
    text, null = stage.text.encoder(prompts), stage.null(torch.device("cpu"))
    assert text.states.shape == (4, 77, 32)
    assert text.mask is None
    assert torch.equal(text.states, states)
    assert torch.equal(null.states.expand(4, -1, -1), empty)
