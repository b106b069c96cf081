"""FID and KID while a stage trains: those of the metric functions on the same images, of any extractor."""

import pytest
import torch

from imagen_lightning.callbacks import EMA, FID, KID, Checkpoint, RunCSVLogger
from imagen_lightning.data.datamodule import LaionDataModule
from imagen_lightning.diffusion.random import seeded_generator
from imagen_lightning.images import downsample, to_float, to_uint8
from imagen_lightning.metrics.features import RandomConvFeatures, TorchScriptFeatures, extract
from imagen_lightning.metrics.frechet import FeatureMoments, frechet_distance
from imagen_lightning.metrics.kid import kernel_distance
from imagen_lightning.types import InputError


def samples(data, num):
    chosen = [data.validation_set()[position] for position in range(num)]
    return torch.stack([sample.image for sample in chosen]), [sample.caption for sample in chosen]


def drawn(stage, captions, truth, **settings):
    """What the stage draws now; after training it holds the average."""
    kind = getattr(stage, "low_res_size", None)
    low_res = None if kind is None else to_float(to_uint8(downsample(to_float(truth), kind)))
    generators = [seeded_generator(0, i, stage=int(kind is not None)) for i in range(len(captions))]
    return to_uint8(stage.sample(captions, generators, low_res=low_res, **settings))


@pytest.mark.parametrize("kind", ["base", "sr"])
@pytest.mark.parametrize("source", ["shapes", "shards"])
def test_they_are_those_of_the_metric_functions(
    fit, make_base, make_sr, make_data, make_shards, tmp_path, read_values, kind, source
):
    data = make_data(num_val=12)
    if source == "shards":
        shards = [make_shards(tmp_path / f"{name}.tar", range(12)) for name in ("train", "val")]
        data = LaionDataModule(*shards, image_size=8, batch_size=4)
    run, shared = tmp_path / "run", {"num_samples": 10, "num_steps": 2}
    stage = make_base() if kind == "base" else make_sr()
    stage, _ = fit([FID(**shared), KID(**shared), EMA()], steps=2, stage=stage, datamodule=data, folder=run)
    truth, captions = samples(data, 10)
    extractor = RandomConvFeatures()
    real, features = (extract(extractor, x) for x in (truth, drawn(stage, captions, truth, num_steps=2)))
    distance, kernel = read_values(run)
    name = "base" if kind == "base" else "sr_8"
    assert (distance["name"], kernel["name"]) == (f"{name}/fd-random", f"{name}/kd-random")
    wanted = frechet_distance(FeatureMoments.of(features), FeatureMoments.of(real))
    assert distance["value"]["value"] == pytest.approx(wanted, rel=1e-9)
    assert distance["value"]["low"] < wanted < distance["value"]["high"]
    assert distance["value"]["confidence"] == "95% bootstrap"
    found = kernel_distance(features, real)
    assert kernel["value"]["value"] == pytest.approx(found.value, rel=1e-9)
    assert kernel["value"]["high"] == pytest.approx(found.value + found.std, rel=1e-9)
    protocol = distance["value"]["protocol"]
    assert protocol["extractor_sha256"] == extractor.sha256
    assert protocol["reference_name"] == "validation images"
    assert protocol["reference"] == kernel["value"]["protocol"]["reference"]
    assert protocol["settings"] == "reference of 10 at 8 px"


class Means(torch.nn.Module):
    """Features of 7 numbers, with weights that a checkpoint would show."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 7)
        self.ballast = torch.nn.Parameter(torch.zeros(500_000))

    def forward(self, x):
        return self.linear(x.mean((2, 3)))


def tensors(content):
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from tensors(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from tensors(value)


def test_another_extractor_under_its_own_name_stays_out_of_checkpoints(fit, tmp_path, read_rows):
    torch.manual_seed(0)
    torch.jit.script(Means()).save(str(tmp_path / "means.pt"))
    extractor = TorchScriptFeatures(tmp_path / "means.pt", size=16, name="means")
    callbacks = [EMA(), FID(extractor, num_samples=6, num_steps=2), KID(extractor, num_samples=6, num_steps=2)]
    fit([*callbacks, Checkpoint()], steps=2, folder=tmp_path / "run", logger=RunCSVLogger(str(tmp_path / "run")))
    (row,) = (row for row in read_rows(tmp_path / "run").values() if "base/fd-means" in row)
    assert row["base/fd-means"] >= 0
    assert "base/kd-means" in row
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert max(tensor.numel() for tensor in tensors(checkpoint)) < 100_000
    assert (tmp_path / "run/checkpoints/last.ckpt").stat().st_size < 1_500_000 < (tmp_path / "means.pt").stat().st_size


def test_an_extractor_that_cannot_be_had_is_refused_before_the_first_step(fit, tmp_path):
    with pytest.raises(InputError, match=r"missing\.pt"):
        fit([FID(TorchScriptFeatures(tmp_path / "missing.pt", size=16))])


class Grey:
    def __call__(self, denoise, x, times, **_):
        return 0 * x


def test_drawings_that_are_all_alike_have_a_distance(fit, make_base, read_values, tmp_path):
    stage = make_base()
    stage.sampling.sampler = Grey()
    fit([FID(num_samples=6), KID(num_samples=6)], steps=1, stage=stage)
    for entry in read_values(tmp_path):
        assert entry["value"]["value"] > 0
        assert entry["value"]["low"] <= entry["value"]["value"] <= entry["value"]["high"]
