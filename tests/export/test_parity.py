"""Whole sampling runs of imported stages against IFPipeline and IFSuperResolutionPipeline."""

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


def theirs(pipeline, steps, guidance, low_res=None, noise_level=250):
    given = {} if low_res is None else {"image": low_res, "noise_level": noise_level}
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
    low_res_size = pipeline.unet.config.sample_size // 4
    return pipeline, import_pipelines([folder], low_res_size=low_res_size).stages[0]


def compare(capsys, name, solver, steps, guidance, saved):
    pipeline, stage = load(saved(name), solver)
    assert isinstance(stage.sampling.sampler, DPMSolverPP if solver else DDPM)
    low_res = images(stage.low_res_size) if "II" in name.split() else None
    expected = theirs(pipeline, steps, guidance, low_res)
    found = ours(stage, steps, guidance, low_res=low_res)
    difference = float((found - expected).abs().max())
    with capsys.disabled():
        how = "DPM-Solver++" if solver else "DDPM, learned variance"
        print(f"\n{name}, {how}, {steps} steps, guidance {guidance:g}: {difference:.1e} of {expected.abs().max():.2f}")
    assert found.shape == expected.shape
    assert difference <= TOLERANCE
    assert expected.std() > 0.1
    # What the two agree on depends on each input.
    assert moved(found, ours(stage, steps, guidance, ["a red star", "a house"], low_res)) > 1000 * TOLERANCE
    assert moved(found, ours(stage, steps, guidance + 1, low_res=low_res)) > 10 * TOLERANCE
    if low_res is not None:
        assert moved(found, ours(stage, steps, guidance, low_res=low_res.flip(3))) > 1000 * TOLERANCE
        assert moved(found, ours(stage, steps, guidance, low_res=low_res, noise_level=600)) > 1000 * TOLERANCE


def moved(one, other):
    return float((one - other).abs().max())


@pytest.mark.parametrize("solver", [False, True], ids=["ddpm", "dpm-solver++"])
@pytest.mark.parametrize(("name", "guidance"), [("stage I", 7.0), ("stage II", 4.0)])
def test_fixture_shapes(capsys, name, guidance, solver, saved):
    compare(capsys, name, solver, 20, guidance, saved)
