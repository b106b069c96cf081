"""Metrics while a stage trains: what is drawn, with which weights, where numbers go; and training as without them."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy

from imagen_lightning.callbacks import (
    EMA,
    FID,
    KID,
    CaptionAccuracy,
    Checkpoint,
    Probes,
    RunCSVLogger,
    SampleGrid,
    averaged_weights,
)
from imagen_lightning.callbacks.sampled_metric import SampledMetric
from imagen_lightning.data.datamodule import LaionDataModule
from imagen_lightning.diffusion.random import seeded_generator
from imagen_lightning.images import downsample, to_float, to_uint8
from imagen_lightning.metrics.digests import digest_texts
from imagen_lightning.metrics.protocol import Value
from imagen_lightning.samplers import DDIM
from imagen_lightning.types import InputError

PROMPTS = ["a small red star on a white background", "a large blue ring on a black background", "nothing"]


class Seen(SampledMetric):
    """Keeps what it is given to measure."""

    def __init__(self, **options):
        super().__init__(**{"num_steps": 2, "every_n_steps": 2, "at_end": False, **options})
        self.seen = []

    metric = "seen"

    def prepare(self, given):
        self.given = given

    def look(self, images, given):
        self.images = images
        return given.positions

    def value(self, found, protocol):
        self.seen.append((self.images, protocol))
        return Value("seen", 0.0, None, None, replace(protocol, metric="seen"))


class Counting(DDIM):
    """Counts runs, and draws from the global generators."""

    runs = 0

    def __call__(self, *args, **kwargs):
        type(self).runs += 1
        self.drawn = random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        return super().__call__(*args, **kwargs)


class Draw(Callback):
    """What the stage draws after step 2, from the average."""

    def __init__(self, captions, number, **more):
        self.captions, self.number, self.more = captions, number, more

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 2:
            generators = [seeded_generator(5, i, stage=self.number) for i in range(len(self.captions))]
            with averaged_weights(trainer, pl_module):
                self.images = to_uint8(pl_module.sample(self.captions, generators, **self.more))


def validation(data):
    """(images, captions) of the validation set."""
    batches = list(data.val_dataloader())
    return torch.cat([b.images for b in batches]), [caption for b in batches for caption in b.captions]


@pytest.mark.parametrize("kind", ["base", "sr"])
def test_draws_what_the_averaged_stage_draws(fit, make_base, make_sr, make_data, kind):
    data = make_data()
    truth, captions = validation(data)
    settings = {"num_steps": 3, "guidance": 2.0, "sampler": DDIM(eta=1.0)}
    more = dict(settings)
    if kind == "sr":
        settings["aug_level"] = more["aug_level"] = 0.2
        more["low_res"] = to_float(to_uint8(downsample(to_float(truth[:5]), 4)))
    draw = Draw(captions[:5], int(kind == "sr"), **more)
    seen = Seen(num_samples=5, seed=5, **settings)
    fit([seen, draw, EMA()], steps=3, stage=make_base() if kind == "base" else make_sr(), datamodule=data)
    ((images, protocol),) = seen.seen
    assert torch.equal(images, draw.images)
    assert (images[0].int() - images[1].int()).abs().max() > 20
    wanted = {"weights": "ema", "precision": "32-true", "guidance": 2, "steps": 3, "sampler": "DDIM(eta=1)", "seed": 5}
    wanted |= {"image_size": 8, "num_samples": 5, "prompts": digest_texts(captions[:5])}
    wanted["aug_level"] = 0.2 if kind == "sr" else None
    assert {name: getattr(protocol, name) for name in wanted} == wanted
    assert torch.equal(seen.given.own.truth, truth[:5])


def test_without_an_average_the_weights_are_raw(fit):
    seen = Seen(num_samples=2)
    fit([seen], steps=2)
    assert seen.seen[0][1].weights == "raw"


def test_prompts_and_training_images(fit, make_data):
    prompts, train = Seen(prompts=PROMPTS), Seen(num_samples=5, split="train")
    data = make_data()
    first = next(iter(data.train_dataloader()))
    fit([prompts, train], steps=2, datamodule=data)
    assert prompts.given.captions == PROMPTS
    assert prompts.given.reference is None
    assert len(prompts.seen[0][0]) == 3
    assert torch.equal(train.given.own.truth[:4], first.images)
    assert train.given.captions[:4] == first.captions


def test_shards_whose_samples_cannot_all_be_used(fit, make_shards, tmp_path):
    data = LaionDataModule(
        make_shards(tmp_path / "train.tar", range(8)),
        make_shards(tmp_path / "val.tar", range(20, 30), broken=(21, 24)),
        image_size=8,
        batch_size=4,
    )
    seen, grid = Seen(num_samples=6), SampleGrid(PROMPTS, num_steps=2)
    fit([seen, grid], steps=2, datamodule=data, folder=tmp_path / "run")
    assert seen.given.own.positions == [0, 2, 3, 5]
    assert len(seen.seen[0][0]) == 4
    sample = data.validation_set()[3]
    assert torch.equal(seen.given.own.truth[2], sample.image)
    assert seen.given.captions[2] == sample.caption


def test_callbacks_that_draw_alike_share_a_drawing(fit, make_base):
    def runs(callbacks, steps=2):
        stage, Counting.runs = make_base(), 0
        stage.sampling.sampler = Counting()
        fit(callbacks, steps=steps, stage=stage)
        return Counting.runs

    alike = {"num_samples": 6, "every_n_steps": 2, "num_steps": 2}
    assert runs([FID(**alike), KID(**alike), CaptionAccuracy(**alike)]) == 1
    assert runs([FID(**alike), KID(**alike)], steps=5) == 3  # 2, 4 and the end
    assert runs([FID(**alike), KID(**alike, seed=1)]) == 2
    assert runs([FID(**alike), KID(**{**alike, "num_samples": 5})]) == 2
    assert runs([FID(**alike), KID(**alike, split="train")]) == 2


def test_a_shared_drawing_is_of_the_step_at_hand(fit):
    first, second = Seen(num_samples=2), Seen(num_samples=2, label="again")
    fit([first, second], steps=4)
    (two, _), (four, _) = first.seen
    assert not torch.equal(two, four)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first.seen, second.seen))


def evaluations():
    shared = {"num_samples": 6, "every_n_steps": 1, "num_steps": 2}
    return [
        SampleGrid(PROMPTS, every_n_steps=1, num_steps=2),
        FID(**shared),
        KID(**shared),
        CaptionAccuracy(**shared),
        Probes(num_samples=16, every_n_steps=1),
    ]


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("kind", ["base", "sr"])
def test_training_is_the_same_to_the_bit(fit, make_base, make_sr, tmp_path, kind):
    """Weights, average, optimizer, random states and position, with dropout on and a sampler that draws globally."""

    def run(name, callbacks):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        stage = make_base(dropout=0.5) if kind == "base" else make_sr()
        stage.sampling.sampler = Counting()
        settings = {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None}
        fit([EMA(), *callbacks, Checkpoint()], stage=stage, folder=tmp_path / name, **settings)
        assert stage.training
        return torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)

    without, with_all = run("without", []), run("with", evaluations())
    parts = ["state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers", "global_step"]
    parts += ["ShapesDataModule", "loops"]
    assert set(parts) <= without.keys()
    for part in parts:
        assert equal(without[part], with_all[part]), part
    assert equal(without["callbacks"]["Checkpoint"]["rng"], with_all["callbacks"]["Checkpoint"]["rng"])
    first, second = (tmp_path / name / "checkpoints/last.ckpt" for name in ("without", "with"))
    assert second.stat().st_size < first.stat().st_size + 20_000  # no extractor's weights
    assert without.keys() == with_all.keys()


def run_with_files(fit, folder, resume=None, steps=4):
    shared = {"num_samples": 6, "every_n_steps": 2, "num_steps": 2}
    fit(
        [
            EMA(),
            FID(**shared),
            CaptionAccuracy(**shared),
            Probes(num_samples=16, every_n_steps=1),
            Checkpoint(2, keep=9),
        ],
        steps=steps,
        folder=folder,
        resume=resume,
        logger=RunCSVLogger(str(folder)),
        log_every_n_steps=1,
    )


def test_numbers_stand_at_the_steps_behind_the_weights(fit, tmp_path, read_rows, read_values):
    run_with_files(fit, tmp_path, steps=3)
    rows = read_rows(tmp_path)
    assert {step for step, row in rows.items() if "base/fd-random" in row} == {2, 3}
    assert {step for step, row in rows.items() if "base/caption_accuracy" in row} == {2, 3}
    assert {step for step, row in rows.items() if "base/denoising_ratio" in row} == {1, 2, 3}
    assert "train/loss" in rows[2]
    entries = read_values(tmp_path)
    assert {entry["step"] for entry in entries if entry["name"] == "base/fd-random"} == {2, 3}
    for entry in entries:
        assert rows[entry["step"]][entry["name"]] == entry["value"]["value"]
        assert entry["value"]["protocol"]["num_samples"] in (6, 16)


def test_a_resumed_run_has_the_numbers_of_the_uninterrupted_one(fit, tmp_path, read_rows, read_values):
    run_with_files(fit, tmp_path / "whole", steps=4)
    run_with_files(fit, tmp_path / "resumed", steps=3)  # the end's numbers, at 3, are of a run that goes on
    before = read_values(tmp_path / "resumed")
    assert {entry["step"] for entry in before} == {1, 2, 3}
    verdict = tmp_path / "resumed/verdict.json"
    assert json.loads(verdict.read_text())["step"] == 3
    run_with_files(fit, tmp_path / "resumed", tmp_path / "resumed/checkpoints/step-2.ckpt", steps=4)
    assert read_values(tmp_path / "resumed") == read_values(tmp_path / "whole")
    whole, resumed = read_rows(tmp_path / "whole"), read_rows(tmp_path / "resumed")
    assert whole == resumed
    assert verdict.read_text() == (tmp_path / "whole/verdict.json").read_text()


class Plain(LightningModule):
    def training_step(self, batch, _):
        pass

    def configure_optimizers(self):
        pass


def test_refusals(fit, make_sr, make_shards, make_data, tmp_path):
    train = make_shards(tmp_path / "train.tar", range(8))
    run = tmp_path / "run"
    without = LaionDataModule(train, image_size=8, batch_size=4)
    for callback in (FID(), Probes(), CaptionAccuracy()):
        with pytest.raises(
            InputError, match=f"{type(callback).__name__} needs? validation images: .* no validation sh"
        ):
            fit([callback], datamodule=without, folder=run)
    broken = LaionDataModule(train, make_shards(tmp_path / "val.tar", range(3), broken=range(3)), 8, 4)
    with pytest.raises(InputError, match="FID needs at least 2 validation images; found 0"):
        fit([FID()], datamodule=broken, folder=run)
    with pytest.raises(InputError, match="Probes found no validation images that can be used"):
        fit([Probes()], datamodule=broken, folder=run)
    with pytest.raises(InputError, match="KID needs at least 4 validation images; found 3"):
        fit([KID()], datamodule=make_data(num_val=3), folder=run)
    with pytest.raises(InputError, match="FID needs no prompts but real images; drop its prompts, which are 3"):
        FID(prompts=PROMPTS)
    with pytest.raises(InputError, match="CaptionAccuracy needs at least 2 prompts"):
        CaptionAccuracy(prompts=PROMPTS[:1])
    with pytest.raises(InputError, match="Seen of a super-resolution stage needs real images; drop its prompts"):
        fit([Seen(prompts=PROMPTS)], stage=make_sr(), folder=run)
    with pytest.raises(InputError, match=r"aug_level 0\.2 is for super-resolution stages; drop it"):
        fit([Seen(aug_level=0.2)], folder=run)
    with pytest.raises(InputError, match=r"aug_level 1\.5 of stage .sr_8. must be in \[0, 1\]"):
        fit([Seen(aug_level=1.5)], stage=make_sr(), folder=run)
    with pytest.raises(InputError, match=r"was given images of \(16, 16\) px for a stage of 8 px; set data\.init_args"):
        fit([Seen()], datamodule=make_data(image_size=16), folder=run)
    with pytest.raises(InputError, match="FID num_samples 1 must be at least 2"):
        FID(num_samples=1)
    with pytest.raises(InputError, match="split 'test' 'val' or 'train'"):
        FID(split="test")
    with pytest.raises(InputError, match="num_steps 0 and batch_size 32"):
        KID(num_steps=0)
    with pytest.raises(InputError, match="FID looks at stages of a cascade; Plain is none"):
        FID().on_train_start(Trainer(logger=False, accelerator="cpu"), Plain())
    spread = SimpleNamespace(strategy=FSDPStrategy())
    for callback in (FID(), Probes(), SampleGrid(PROMPTS)):
        with pytest.raises(InputError, match="cannot draw with weights that FSDPStrategy spreads over processes; use"):
            callback.on_train_start(spread, make_sr())
    assert not (run / "values.jsonl").exists()


def test_images_of_buckets_are_refused(fit, make_shards, tmp_path):
    import io
    import tarfile

    from PIL import Image

    path = tmp_path / "wide.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(8):
            buffer = io.BytesIO()
            Image.new("RGB", (64, 32), (number, 0, 0)).save(buffer, "PNG")
            for suffix, content in (("png", buffer.getvalue()), ("txt", b"wide")):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    data = LaionDataModule(str(path), image_size=8, batch_size=4, crop="bucket", bucket_step=2)
    with pytest.raises(InputError, match=r"Seen was given images of .* px for a stage of 8 px; use the validation set"):
        fit([Seen(split="train")], datamodule=data, folder=tmp_path / "run")


def test_every_name_is_logged_by_one_callback(fit, tmp_path, read_rows):
    shared = {"num_samples": 4, "num_steps": 2}
    with pytest.raises(InputError, match="two callbacks log base/fd-random; give one a label"):
        fit([FID(**shared), KID(**shared), FID(**shared, guidance=1.0)])
    others = [FID(**shared, seed=1, label="again"), FID(**shared, split="train")]
    fit([FID(**shared), KID(**shared), *others], steps=1, logger=RunCSVLogger(str(tmp_path)))
    row = read_rows(tmp_path)[1]
    assert len(set(row.values())) == len(row)
    assert {"base/fd-random", "base/kd-random", "base/fd-random_again", "base/fd-random_train"} <= row.keys()


def test_values_that_are_none_are_refused(fit, tmp_path):
    (tmp_path / "values.jsonl").write_text("hello\n")
    with pytest.raises(InputError, match=r"values\.jsonl holds no values; move it"):
        fit([FID(num_samples=4)])
