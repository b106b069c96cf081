"""The verdict in words: healthy stages pass, each planted ailment is named, and the numbers are those of the probes."""

import json
import math

import pytest
import torch
from lightning.pytorch import Callback

from imagen_lightning.callbacks import EMA, Checkpoint, Probes, RunCSVLogger, averaged_weights
from imagen_lightning.callbacks.drawing import first_pictures
from imagen_lightning.callbacks.probes import (
    MAX_COLOUR_SHIFT,
    MAX_DENOISING_RATIO,
    MIN_TEXT_GAIN,
    MIN_TEXT_Z,
    Findings,
)
from imagen_lightning.data.datamodule import LaionDataModule
from imagen_lightning.diffusion.random import seeded_generator
from imagen_lightning.images import to_float, to_uint8
from imagen_lightning.metrics.probes import colour_shift, denoising_ratios, text_gains, z_score
from imagen_lightning.networks import UNet
from imagen_lightning.stages import BaseStage
from imagen_lightning.types import InputError


def numbers(mean, z=None, num=64):
    """64 numbers of a mean, and a distance from 0 in standard errors."""
    spread = torch.linspace(-1, 1, num, dtype=torch.float64)
    return mean + spread * (0 if z is None else abs(mean / z) * num**0.5 / float(spread.std()))


def spread(mean, error, num=64):
    """64 numbers of a mean and its standard error."""
    line = torch.linspace(-1, 1, num, dtype=torch.float64)
    return mean + line * error * num**0.5 / float(line.std())


def verdict(ratio=0.1, text=None, shift=None):
    return Findings(numbers(ratio), text, None if shift is None else numbers(shift)).verdict()


def test_words_at_the_thresholds():
    heard, ignored = numbers(0.02, MIN_TEXT_Z + 0.01), numbers(0.02, MIN_TEXT_Z - 0.01)
    assert z_score(ignored) == pytest.approx(MIN_TEXT_Z - 0.01)
    assert verdict() == []
    assert verdict(MAX_DENOISING_RATIO - 0.01, heard) == []
    (noise,) = verdict(MAX_DENOISING_RATIO + 0.01)
    assert noise.startswith(f"still noise at t<0.2: the error is {MAX_DENOISING_RATIO + 0.01:.2f} of that with no know")
    assert "keep training" in noise
    (text,) = verdict(text=ignored)
    assert text.startswith(
        "whether text is heard cannot be told: true captions save 2.00% of the error, 3.0 standard e"
    )
    assert verdict(text=numbers(MIN_TEXT_GAIN + 1e-4, 9)) == []
    assert verdict(text=numbers(MIN_TEXT_GAIN - 1e-4, 9))[0].startswith("text is ignored: true captions save 0.19% of")
    assert verdict(text=numbers(-0.02, 9))[0].startswith(
        "text is ignored: true captions save -2.00% of the error, -9.0"
    )
    assert verdict(shift=MAX_COLOUR_SHIFT - 0.1) == []
    (colour,) = verdict(shift=MAX_COLOUR_SHIFT + 0.1)
    assert colour.startswith(f"colour drifts: outputs lie {MAX_COLOUR_SHIFT + 0.1:.1f}/255 from their low-resolution")
    # A super-resolution stage sees its low-resolution input: that it has no use for text ails nothing.
    assert verdict(text=ignored, shift=1.0) == []
    assert len(verdict(1.0, ignored)) == len(verdict(1.0, None, 50.0)) == 2
    (broken,) = verdict(math.nan, ignored)
    assert broken.startswith("the weights give no finite images")


class Measured(Callback):
    """What the probes find of the average at step 2."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step != 2:
            return
        given = first_pictures(trainer, pl_module, 16, "test")
        with averaged_weights(trainer, pl_module), torch.no_grad():
            pl_module.eval()
            batches = given.batches(5)
            self.wanted = {
                "denoising_ratio": float(denoising_ratios(pl_module, batches, 0).mean()),
                "text_gain": float(text_gains(pl_module, batches, 0).mean()),
                "text_z": z_score(text_gains(pl_module, batches, 0)),
            }
            if given.low_res is not None:
                part = given.part(slice(4))
                generators = [seeded_generator(0, i, stage=1) for i in range(4)]
                images = pl_module.sample(part.captions, generators, num_steps=3, low_res=to_float(part.low_res))
                self.wanted["colour_shift"] = float(colour_shift(to_uint8(images), part.low_res).mean())
            pl_module.train()


@pytest.mark.parametrize("kind", ["base", "sr"])
def test_the_numbers_are_those_of_the_probes_with_the_averaged_weights(
    fit, make_base, make_sr, make_data, tmp_path, read_rows, read_values, kind
):
    stage = make_base(dropout=0.5) if kind == "base" else make_sr()
    measured = Measured()
    probes = Probes(num_samples=16, num_drawn=4, every_n_steps=2, at_end=False, num_steps=3, batch_size=5)
    callbacks = [measured, probes, EMA()]
    fit(callbacks, steps=3, stage=stage, datamodule=make_data(num_val=20), logger=RunCSVLogger(str(tmp_path)))
    name = "base" if kind == "base" else "sr_8"
    wanted = {f"{name}/{key}": value for key, value in measured.wanted.items()}
    row = read_rows(tmp_path)[2]
    assert {key: row[key] for key in wanted} == pytest.approx(wanted, rel=1e-6)
    entries = {entry["name"]: entry["value"] for entry in read_values(tmp_path)}
    assert entries.keys() == wanted.keys()
    ratio = entries[f"{name}/denoising_ratio"]
    assert ratio["low"] < ratio["value"] < ratio["high"]
    assert ratio["protocol"]["settings"] == "t 0.05, 0.1, 0.15"
    assert ratio["protocol"]["weights"] == "ema"
    if kind == "sr":
        protocol = entries["sr_8/colour_shift"]["protocol"]
        assert (protocol["num_samples"], protocol["steps"], protocol["aug_level"]) == (4, 3, 0.1)


def said(words):
    return [sentence.split(":")[0] for sentence in words]


def test_an_untrained_base_is_noise_and_ignores_text(fit, make_base, make_data, tmp_path):
    fit([Probes(num_samples=32)], steps=1, stage=make_base(), datamodule=make_data(num_val=32))
    content = json.loads((tmp_path / "verdict.json").read_text())
    assert (content["step"], content["stage"]) == (1, "base")
    assert said(content["verdict"]) == ["still noise at t<0.2", "text is ignored"]


@pytest.mark.parametrize(
    ("found", "head"),
    [
        (Findings(spread(0.3, 0.05), None, None), None),
        (Findings(spread(0.7, 0.05), None, None), "still noise at t<0.2"),
        (Findings(spread(0.45, 0.05), None, None), "whether noise at t<0.2 is removed cannot be told"),
        (Findings(spread(0.55, 0.05), None, None), "whether noise at t<0.2 is removed cannot be told"),
        (Findings(numbers(0.1), None, spread(2, 1)), None),
        (Findings(numbers(0.1), None, spread(9, 1)), "colour drifts"),
        (Findings(numbers(0.1), None, spread(6, 1)), "whether colour drifts cannot be told"),
        (Findings(numbers(0.1), None, torch.tensor([3.0])), "whether colour drifts cannot be told"),
        (Findings(numbers(0.1), spread(0.05, 0.01), None), None),
        (Findings(numbers(0.1), spread(0.0, 0.005), None), "text is ignored"),
        (Findings(numbers(0.1), spread(0.0, 0.05), None), "whether text is heard cannot be told"),
        (Findings(numbers(0.1), spread(0.04, 0.02), None), "whether text is heard cannot be told"),
        (Findings(numbers(0.1), torch.zeros(0), None), "whether text is heard cannot be told"),
    ],
)
def test_each_sentence_says_yes_no_or_that_it_cannot_tell(found, head):
    assert said(found.verdict()) == ([] if head is None else [head])


class Shuffle(Callback):
    """Gives each image another one's caption."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch.captions = batch.captions[1:] + batch.captions[:1]


def deaf(stage):
    """The stage without influence of its text."""
    for name, parameter in stage.named_parameters():
        if "text" in name:
            torch.nn.init.zeros_(parameter)
    return stage


@pytest.mark.slow
def test_a_base_that_hears_its_text_and_one_that_learned_from_shuffled_captions(fit, make_base, make_data, tmp_path):
    data = {"num_val": 64, "batch_size": 16}
    words = {}
    for name, callbacks in (("heard", []), ("shuffled", [Shuffle()])):
        probes = Probes(num_samples=64)
        stage, _ = fit(
            [EMA(0.9), probes, *callbacks],
            steps=200,
            stage=make_base(dim=16),
            datamodule=make_data(**data),
            folder=tmp_path / name,
        )
        words[name] = said(json.loads((tmp_path / name / "verdict.json").read_text())["verdict"])
        if name == "heard":
            trained = stage
    assert "text is ignored" not in words["heard"]
    assert "text is ignored" in words["shuffled"]
    trained.optimization.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.0)
    fit([Probes(num_samples=64)], steps=1, stage=deaf(trained), datamodule=make_data(**data), folder=tmp_path / "deaf")
    assert "text is ignored" in said(json.loads((tmp_path / "deaf/verdict.json").read_text())["verdict"])


class Faithful:
    """Draws each low-resolution input enlarged, a little brighter."""

    def __init__(self, brighter):
        self.brighter = brighter

    def __call__(self, denoise, x, times, **_):
        return self.given + self.brighter / 127.5


@pytest.mark.parametrize(("brighter", "drifts"), [(1, False), (12, True)])
def test_a_super_resolution_stage_whose_colours_drift(fit, make_sr, make_data, tmp_path, brighter, drifts):
    stage = make_sr()
    prepare, sampler = stage.prepare_low_res, Faithful(brighter)

    def remember(low_res, *rest):
        sampler.given = stage.enlarge(low_res)
        return prepare(low_res, *rest)

    stage.prepare_low_res = remember
    stage.sampling.sampler = sampler
    fit([Probes(num_samples=16)], steps=1, stage=stage, datamodule=make_data(num_val=16))
    words = said(json.loads((tmp_path / "verdict.json").read_text())["verdict"])
    assert ("colour drifts" in words) == drifts


def test_a_stage_without_text_or_with_one_caption_alone_has_no_text_to_ignore(
    fit, make_data, make_shards, tmp_path, read_values
):
    network = UNet(dim=8, multipliers=(1, 2), num_blocks=1, attention=(False, False), groups=4, head_dim=8)
    fit([Probes(num_samples=16)], steps=1, stage=BaseStage(8, network), datamodule=make_data(num_val=16))
    shard = make_shards(tmp_path / "train.tar", range(16), caption="a dog")
    data = LaionDataModule(shard, shard, image_size=8, batch_size=4)
    fit([Probes(num_samples=16)], steps=1, datamodule=data, folder=tmp_path / "run")
    for folder in (tmp_path, tmp_path / "run"):
        assert [entry["name"] for entry in read_values(folder)] == ["base/denoising_ratio"]
    words = [json.loads((folder / "verdict.json").read_text())["verdict"] for folder in (tmp_path, tmp_path / "run")]
    assert [any("whether text is heard" in sentence for sentence in found) for found in words] == [False, True]


def test_what_changes_is_said(fit, tmp_path, caplog, monkeypatch):
    ratios = iter([0.9, 0.8, 0.1, 0.1, 0.7])
    monkeypatch.setattr(Probes, "_findings", lambda *_: (Findings(numbers(next(ratios)), None, None), True))
    fit([Probes(num_samples=16, every_n_steps=1)], steps=5)
    said = [record.getMessage() for record in caplog.records if record.name == "imagen_lightning.callbacks.probes"]
    assert [line.partition(": ")[0] for line in said] == ["base, step 1", "base, step 3", "base, step 5"]
    assert said[0].startswith("base, step 1: still noise at t<0.2: the error is 0.90 of")
    assert said[1] == "base, step 3: nothing ails any more"
    assert json.loads((tmp_path / "verdict.json").read_text())["step"] == 5


def test_a_verdict_of_a_later_step_is_dropped_where_a_run_goes_on(fit, tmp_path):
    fit([Checkpoint(every_n_steps=1)], steps=2)
    path = tmp_path / "verdict.json"
    for content, stays in (
        ('{"step": 2, "verdict": ["a"]}', True),
        ('{"step": 3, "verdict": []}', False),
        ("x", False),
    ):
        path.write_text(content)
        probes = Probes(num_samples=16, at_end=False)
        fit([probes, Checkpoint()], steps=2, resume=tmp_path / "checkpoints/step-2.ckpt")
        assert path.exists() == stays


def test_refusals(fit):
    with pytest.raises(InputError, match="Probes num_samples 8 must be at least 16, num_drawn 16 at least 2"):
        Probes(num_samples=8)
    with pytest.raises(InputError, match="num_drawn 1 at least 2"):
        Probes(num_drawn=1)
    with pytest.raises(InputError, match="every_n_steps 0"):
        Probes(every_n_steps=0)
