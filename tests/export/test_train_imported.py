"""What an imported stage is trained on, against diffusers' schedulers and U-Nets; the shipped experiments."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from diffusers import IFPipeline, IFSuperResolutionPipeline
from PIL import Image

from imagen_lightning.cascade import Cascade
from imagen_lightning.cli.main import main
from imagen_lightning.components import describe
from imagen_lightning.diffusion import Epsilon, FixedVariance, LearnedRange
from imagen_lightning.diffusion.random import Stream, normal
from imagen_lightning.export.import_pipelines import import_pipelines
from imagen_lightning.finetuning import from_cascade
from imagen_lightning.finetuning.start import SamplingChanges
from imagen_lightning.images import to_float
from imagen_lightning.samplers import DDPM
from imagen_lightning.types import Batch, Denoised

EXPERIMENTS = Path(__file__).parents[2] / "experiments" / "deepfloyd"
CAPTIONS = ["A red star", "two cats on a mat", "rain"]
SEED = 3


@pytest.fixture(scope="session")
def cascade(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "cascade"
    sources = [saved("stage I", gain=1.0), saved("larger stage II", with_text=False, gain=1.0)]
    import_pipelines(sources).save(folder)
    return folder


def make_batch(size):
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(len(CAPTIONS), 3, size // 4, size // 4, generator=generator)
    images = (255 * F.interpolate(small, size=(size, size), mode="bicubic").clamp(0, 1)).round().to(torch.uint8)
    return Batch(images, CAPTIONS, ["a", "b", "c"], torch.tensor([5, 6, 7]))


def step(stage, batch):
    """The losses and times, what the network was given, and its output."""
    calls, predict = [], stage.predict

    def watched(x_t, t, conditioning):
        output = predict(x_t, t, conditioning)
        calls.append((x_t, conditioning, output))
        return output

    stage.predict = watched
    stage.log = lambda *_, **__: None
    stage.seed = SEED
    loss = stage.training_step(batch, 0)
    (x_t, conditioning, output) = calls[0]
    return loss, stage.record, x_t, conditioning, output


def noise(stream, batch):
    return normal(SEED, stream, batch.positions, tuple(batch.images.shape[1:]))


@pytest.mark.parametrize("name", ["base", "sr_64"])
def test_the_objective_of_an_imported_stage(name, cascade, saved):
    """The network is given, and asked for, what diffusers' schedulers make of the same images, noise and levels."""
    stage = from_cascade(str(cascade), name, text_drop=0.0)
    assert isinstance(stage.diffusion.parametrization, Epsilon)
    assert describe(stage.diffusion.variance) == describe(LearnedRange())
    text = IFPipeline.from_pretrained(saved("stage I", gain=1.0))
    source, kind = (saved("stage I", gain=1.0), IFPipeline)
    if name == "sr_64":
        source, kind = saved("larger stage II", with_text=False, gain=1.0), IFSuperResolutionPipeline
    pipeline = kind.from_pretrained(source)
    batch = make_batch(stage.image_size)
    loss, record, x_t, conditioning, output = step(stage, batch)

    x0, epsilon = to_float(batch.images), noise(Stream.NOISE, batch)
    steps = (record.times * 1000).round().long() - 1
    expected = pipeline.scheduler.add_noise(x0, epsilon, steps)
    assert torch.allclose(x_t, expected, atol=1e-5)
    given, labels = expected, None
    if name == "sr_64":
        labels = (conditioning.aug_level * 1000).round().long()
        assert len(labels.unique()) == len(labels)  # a level a sample
        enlarged = F.interpolate(
            F.interpolate(x0, size=(32, 32), mode="area"), (64, 64), mode="bilinear", align_corners=True
        )
        low_res = pipeline.image_noising_scheduler.add_noise(enlarged, noise(Stream.AUG_NOISE, batch), labels)
        assert torch.allclose(conditioning.low_res, low_res, atol=1e-5)
        given = torch.cat([expected, low_res], dim=1)
    states, _ = text.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)

    def theirs(given, labels):
        with torch.no_grad():
            return pipeline.unet(given, steps, encoder_hidden_states=states, class_labels=labels).sample

    answer = theirs(given, labels)
    assert (output - answer).abs().max() < 1e-4 * answer.abs().max()
    if name == "sr_64":
        # As diffusers' DreamBooth script trains it: without low-res image, without level.
        for wrong in (theirs(torch.cat([expected] * 2, 1), labels), theirs(given, steps)):
            assert (output - wrong).abs().max() > 1e-2 * answer.abs().max()

    simple = (answer[:, :3] - epsilon).square().flatten(1).mean(1)
    process = stage.process
    alpha, sigma = process.coefficients(record.times, x0)
    denoised = Denoised((expected - sigma * answer[:, :3]) / alpha, (answer[:, 3:] + 1) / 2)
    bound = process.variance.losses(denoised, x0, record.times, process.schedule)
    assert torch.allclose(record.losses, simple + bound, rtol=1e-3)
    loss.backward()
    rows = stage.network.conv_out.weight.grad.abs().amax(dim=(1, 2, 3))
    assert (rows > 0).all()  # epsilon's and the variance's


@pytest.mark.parametrize("name", ["base", "sr_64"])
def test_the_variance_can_be_left_aside(name, cascade):
    stage = from_cascade(
        str(cascade),
        name,
        text_drop=0.0,
        variance=FixedVariance(),
        sampling=SamplingChanges(sampler=DDPM("small"), num_steps=2),
    )
    batch = make_batch(stage.image_size)
    loss, record, _, _, output = step(stage, batch)
    assert output.shape[1] == 6
    simple = (output[:, :3] - noise(Stream.NOISE, batch)).square().flatten(1).mean(1)
    assert torch.allclose(record.losses, simple, rtol=1e-5)
    loss.backward()
    gradient = stage.network.conv_out.weight.grad
    assert (gradient[:3] != 0).any()
    assert not gradient[3:].any()


@pytest.mark.parametrize("name", ["base_64", "sr_256"])
def test_the_experiments_run(name, cascade, tmp_path, monkeypatch):
    """Each shipped experiment on the tiny cascade, at its sizes, for two steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(sys, "argv", ["imagen-lightning"])
    config = yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text())
    stage, size = {"base_64": ("base", 32), "sr_256": ("sr_64", 64)}[name]
    images = Path("images")
    images.mkdir()
    batch = make_batch(size)
    for number, (image, caption) in enumerate(zip(batch.images, CAPTIONS)):
        Image.fromarray(image.permute(1, 2, 0).numpy(), "RGB").save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(caption)
    shutil.copytree(images, "heldout")
    config["model"]["init_args"] |= {"cascade": str(cascade), "stage": stage}
    config["model"]["init_args"]["optimization"]["warmup_steps"] = 0
    config["data"]["init_args"] |= {"image_size": size, "batch_size": 2, "num_workers": 0}
    config["trainer"] |= {"accelerator": "cpu", "precision": "32-true", "max_steps": 2, "log_every_n_steps": 1}
    config["trainer"]["callbacks"][1]["init_args"] |= {"every_n_steps": 2, "num_steps": 1}
    Path("tiny.yaml").write_text(
        yaml.safe_dump({**config, "run": "runs/tuned", "throughput": {"measure_matmul": False}})
    )
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    assert main(["cascade", "runs/tuned", "joined"]) == 0
    tuned = Cascade.load("joined").stages[0]
    before = next(s for s in Cascade.load(cascade).stages if s.image_size == tuned.image_size).state_dict()
    changed = {key for key, value in tuned.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all("attention" in key for key in changed)
    assert "deepfloyd-if-license" in Path("joined/cascade.json").read_text()
    assert main(["export", "joined", "pipelines", "--format", "diffusers"]) == 0
    header = yaml.safe_load(Path("pipelines/README.md").read_text().split("---")[1])
    assert header["license_name"] == "deepfloyd-if-license"
    assert Path("pipelines/stage_1/LICENSE").read_text() == "The licence's text.\n"
    kind = IFPipeline if stage == "base" else IFSuperResolutionPipeline
    pipeline = kind.from_pretrained("pipelines/stage_1")
    assert torch.equal(pipeline.unet.conv_in.weight, tuned.network.conv_in.weight)
    assert torch.equal(
        pipeline.unet.mid_block.attentions[0].to_out[0].weight, tuned.network.mid_attention.to_out.weight
    )


def test_the_experiments_differ_in_their_stage_alone():
    base, larger = (yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text()) for name in ("base_64", "sr_256"))
    assert base["model"]["init_args"].pop("stage") == "base"
    assert larger["model"]["init_args"].pop("stage") == "sr_256"
    assert base["model"] == larger["model"]
    assert (base["data"]["init_args"]["image_size"], larger["data"]["init_args"]["image_size"]) == (64, 256)
