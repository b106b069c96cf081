"""Cascades: chaining, seeds, the folder, checkpoints, and what is refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from torch import nn

from imagen_lightning.cascade import Cascade, find_sampler, load_weights
from imagen_lightning.data.datamodule import ShapesDataModule
from imagen_lightning.diffusion import P2, DiscreteSchedule, Epsilon, LearnedRange, LogNormalTimes
from imagen_lightning.diffusion.random import seeded_generator
from imagen_lightning.images import downsample, to_float, to_pil, to_uint8
from imagen_lightning.networks import EfficientUNet, UNet
from imagen_lightning.samplers import DDIM, DDPM, DPMSolverPP, DPMSolverPPSDE, Heun, ListedTimes
from imagen_lightning.stages import BaseStage, Diffusion, Sampling, SuperResolutionStage, TextSettings
from imagen_lightning.text import TinyTextEncoder, TransformerEncoder
from imagen_lightning.types import InputError, Sampler

CAPTIONS = ["a small red star", "a large blue circle above a small green square", "a cross"]
SMALL = {"dim": 8, "multipliers": [1, 2], "num_blocks": 1, "head_dim": 8, "groups": 4, "text_dim": 16}


def randomised(stage, seed=0):
    """Weights that make every part of the network count; as made, its last layer is zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in stage.parameters():
        nn.init.normal_(parameter, std=0.15, generator=generator)
    return stage


def base_stage(image_size=8, **text):
    text = {"encoder": TinyTextEncoder(dim=16, max_tokens=16), **text}
    sampling = Sampling(num_steps=3, guidance=2.0)
    network = UNet(**SMALL, attention=[False, True])
    return BaseStage(image_size, network, text=TextSettings(**text), sampling=sampling)


def sr_stage(low_res_size=8, image_size=16):
    text = TextSettings(
        TinyTextEncoder(dim=12, max_tokens=16),
        TransformerEncoder(12, 16, num_layers=1, num_heads=2),
        null_text="learned",
    )
    network = EfficientUNet(**SMALL, attention=["none", "cross"])
    return SuperResolutionStage(
        image_size, low_res_size, network, text=text, sampling=Sampling(num_steps=2, guidance=1.0)
    )


@pytest.fixture(scope="module")
def cascade():
    return Cascade([randomised(base_stage(), 1), randomised(sr_stage(), 2)])


class Recorder(Sampler):
    """Keeps the noise that each image begins with and one more draw, and denoises once."""

    def __init__(self):
        self.noise = []

    def __call__(self, denoise, x, times, *, schedule, generator=None):
        self.noise += [(row, torch.randn(4, generator=own)) for row, own in zip(x, generator)]
        return denoise(x, times[:1].float().expand(len(x)))


def close(first, second):
    """Within 1/255 on 99.9% of pixels."""
    return ((first.int() - second.int()).abs() <= 1).float().mean() >= 0.999


# ---- chaining


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (lambda: [], ["at least one"]),
        (lambda: [base_stage(16), sr_stage(8, 32)], ["sr_32", "8 px", "base", "16 px"]),
        (lambda: [sr_stage(8, 16), base_stage(8)], ["'base' of 8 px", "'sr_16' of 16 px", "first"]),
        (lambda: [base_stage(8), base_stage(8)], ["takes no low-resolution image"]),
    ],
)
def test_stages_that_do_not_chain_are_refused_by_name(stages, words):
    with pytest.raises(InputError) as error:
        Cascade(stages())
    assert all(word in str(error.value) for word in words)


def test_describe_says_what_the_stages_are(cascade):
    base, sr = cascade.describe().splitlines()
    assert base.startswith("base: 8 px")
    assert "tiny-bytes-d16-s0 (16 tokens)" in base
    assert "DDIM 3 steps, guidance 2" in base
    assert sr.startswith("sr_16: 8 -> 16 px")
    assert "aug level 0.1" in sr


# ---- seeds


def test_noise_is_the_same_to_the_bit_and_images_agree_for_any_batch_size(cascade):
    drawn = {}
    for batch_size in (1, 2, 3):
        sampler = Recorder()
        cascade.sample(CAPTIONS, seed=7, sampler=sampler, batch_size=batch_size)
        drawn[batch_size] = [torch.cat([noise.flatten(), more]) for noise, more in sampler.noise]
    assert all(torch.equal(a, b) for other in (2, 3) for a, b in zip(drawn[1], drawn[other], strict=True))
    expected = torch.randn(3, 8, 8, generator=seeded_generator(7, 1, 0))
    assert torch.equal(drawn[1][1][: 3 * 64], expected.flatten())
    whole, single = cascade.sample(CAPTIONS, seed=7), cascade.sample(CAPTIONS, seed=7, batch_size=1)
    assert whole.images.float().std() > 20  # no trivial picture
    for one, other in zip(whole.stages, single.stages, strict=True):
        assert close(one, other)


def test_images_differ_by_seed_index_and_stage_alone(cascade):
    same = [CAPTIONS[0]] * 3
    first = cascade.sample(same, seed=1, sampler="ddpm")
    assert not close(first.images[0], first.images[1])
    assert not close(first.images, cascade.sample(same, seed=2, sampler="ddpm").images)
    assert close(first.images[2:], cascade.sample(same[:1], seed=1, sampler="ddpm", first_index=2).images)
    own = cascade.sample(same, seed=[5, 1, 5], sampler="ddpm")
    assert close(own.images[0], own.images[2])
    assert close(own.images[1], first.images[0])
    sampler = Recorder()
    cascade.sample(same[:1], sampler=sampler)
    base, sr = (noise for noise, _ in sampler.noise)
    assert not torch.equal(base.flatten(), sr.flatten()[: base.numel()])


# ---- from stage to stage


def test_result_has_every_stage_as_uint8(cascade):
    result = cascade.sample(CAPTIONS[:2])
    assert [tuple(images.shape) for images in result.stages] == [(2, 3, 8, 8), (2, 3, 16, 16)]
    assert all(images.dtype == torch.uint8 for images in result.stages)
    assert result.images is result.stages[-1]
    assert torch.equal(cascade.sample(CAPTIONS[0]).images, cascade.sample([CAPTIONS[0]]).images)


def test_a_later_stage_goes_on_from_pictures_as_the_chain_does(cascade):
    chain = cascade.sample(CAPTIONS, seed=3)
    low = chain.stages[0]
    for images in (low, [to_pil(image) for image in low], to_float(low)):
        alone = cascade.sample(CAPTIONS, seed=3, images=images, start_stage=1)
        assert torch.equal(alone.images, chain.images)
        assert len(alone.stages) == 1
    assert torch.equal(
        cascade.sample(CAPTIONS, seed=3, images=low, start_stage="sr_16").images,
        chain.images,
    )
    other = cascade.sample(CAPTIONS, seed=3, images=low.flip(-1), start_stage=1)
    assert not close(other.images, chain.images)


def test_larger_square_pictures_pass_the_one_filter(cascade):
    large = torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    small = to_uint8(downsample(to_float(large), 8))
    results = [cascade.sample(CAPTIONS, images=images, start_stage=1).images for images in (large, small)]
    assert torch.equal(*results)


def test_a_cascade_of_super_resolution_alone_starts_from_pictures(cascade):
    alone = Cascade(cascade.stages[1:])
    low = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    assert alone.sample(CAPTIONS, images=low).images.shape == (3, 3, 16, 16)
    with pytest.raises(InputError, match=r"'sr_16' starts from low-resolution images of 8 px"):
        alone.sample(CAPTIONS)


# ---- settings


def test_settings_are_one_value_or_one_a_stage(cascade):
    def settings(**given):
        return [(s.steps, s.guidance, type(s.sampler), s.aug_level) for s in cascade.sample("a star", **given).settings]

    assert settings() == [(3, 2.0, DDIM, None), (2, 1.0, DDIM, 0.1)]
    assert settings(steps=1, guidance=4, sampler="DDPM", aug_level=0.3) == [(1, 4, DDPM, None), (1, 4, DDPM, 0.3)]
    each = {"steps": [2, 1], "guidance": (1.5, None), "sampler": [None, DPMSolverPP()], "aug_level": [0, 0.2]}
    assert settings(**each) == [(2, 1.5, DDIM, None), (1, 1.0, DPMSolverPP, 0.2)]


@pytest.mark.parametrize("setting", [{"steps": [1, 2]}, {"guidance": [2, 5]}, {"aug_level": 0.9}])
def test_a_setting_reaches_its_stage_alone(cascade, setting):
    plain, changed = cascade.sample(CAPTIONS, sampler="ddim"), cascade.sample(CAPTIONS, sampler="ddim", **setting)
    assert close(plain.stages[0], changed.stages[0]) == ("steps" not in setting)
    assert not close(plain.images, changed.images)


def test_samplers_are_found_by_name():
    for name in ("dpmpp", "DPMSolverPP", "DPM-Solver++", "dpm_pp"):
        assert type(find_sampler(name)) is DPMSolverPP
    assert type(find_sampler("Ddim")) is DDIM
    assert type(find_sampler("DPM-Solver++ SDE")) is DPMSolverPPSDE
    assert type(find_sampler("heun")) is Heun
    with pytest.raises(InputError, match=r"sampler 'euler' is unknown; use one of .*ddim, ddpm, dpmpp"):
        find_sampler("euler")
    with pytest.raises(InputError, match="unknown"):
        find_sampler("UniformTimes")


def test_guidance_of_one_takes_a_single_pass(cascade):
    rows = []
    handles = [
        stage.network.register_forward_hook(lambda _, args, __: rows.append(len(args[0]))) for stage in cascade.stages
    ]
    cascade.sample(CAPTIONS, guidance=1, steps=1)
    assert rows == [3, 3]
    cascade.sample(CAPTIONS, guidance=[3, 1], steps=1)
    assert rows[2:] == [6, 3]
    for handle in handles:
        handle.remove()


def test_negative_captions_stand_in_for_the_null_text(cascade):
    plain = cascade.sample(CAPTIONS, guidance=3)
    away = cascade.sample(CAPTIONS, guidance=3, negative="a blue circle")
    assert not close(plain.images, away.images)
    assert torch.equal(away.images, cascade.sample(CAPTIONS, guidance=3, negative=["a blue circle"] * 3).images)
    # The guided estimate of a caption away from itself is the unguided one.
    itself = cascade.sample(CAPTIONS, guidance=3, negative=CAPTIONS)
    plain = cascade.sample(CAPTIONS, guidance=1)
    assert all(close(one, other) for one, other in zip(itself.stages, plain.stages, strict=True))


def test_a_negative_caption_concerns_the_guided_stages_alone(cascade):
    away = cascade.sample(CAPTIONS, guidance=[3, 1], negative="a blue circle")
    first = cascade.sample(CAPTIONS, guidance=3, negative="a blue circle").stages[0]
    assert torch.equal(away.stages[0], first)


def test_bf16_is_near_32_and_not_the_same(cascade):
    full, half = cascade.sample(CAPTIONS), cascade.sample(CAPTIONS, precision="bf16")
    difference = (full.stages[0].float() - half.stages[0].float()).abs()
    assert 0 < difference.mean() < 6


def test_progress_counts_network_evaluations(cascade):
    seen = []
    cascade.sample(CAPTIONS, batch_size=2, progress=lambda *report: seen.append(report))
    assert seen == [(i + 1, 10, "base" if i < 6 else "sr_16") for i in range(10)]


BLACK = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"captions": []}, ["no captions"]),
        ({"steps": [3, 2, 1]}, ["steps has 3 values for 2 stages (base, sr_16)"]),
        ({"steps": 0}, ["steps 0", "at least 1"]),
        ({"steps": 2.5}, ["steps 2.5", "whole number"]),
        ({"guidance": float("nan")}, ["guidance nan"]),
        ({"sampler": "euler"}, ["'euler'", "ddim", "dpmpp"]),
        ({"sampler": 3}, ["sampler 3"]),
        ({"aug_level": 1.5}, ["aug_level 1.5", "'sr_16'", "[0, 1]"]),
        ({"negative": "x", "guidance": 1}, ["guidance", "1 in every stage"]),
        ({"negative": ["x"]}, ["1 negative captions for 3"]),
        ({"seed": [1, 2]}, ["2 seeds for 3"]),
        ({"start_stage": 2}, ["stage 2 is unknown", "1 (sr_16)"]),
        ({"start_stage": "sr_64"}, ["stage 'sr_64' is unknown", "sr_16"]),
        ({"start_stage": 1}, ["8 px", "give images"]),
        ({"images": BLACK}, ["starts from text alone"]),
        ({"images": BLACK[:2], "start_stage": 1}, ["2 images for 3 captions"]),
        ({"images": BLACK[..., :4, :4], "start_stage": 1}, ["4x4 px", "8x8"]),
        ({"images": torch.zeros(3, 3, 16, 12), "start_stage": 1}, ["12x16 px", "square"]),
        ({"images": torch.full((3, 3, 8, 8), 255.0), "start_stage": 1}, ["[-1, 1]"]),
        ({"images": BLACK.long(), "start_stage": 1}, ["uint8"]),
        ({"images": BLACK[:, :1], "start_stage": 1}, ["(1, 8, 8)"]),
        ({"batch_size": 0}, ["batch_size 0"]),
        ({"precision": "16"}, ["precision '16'"]),
    ],
)
def test_what_cannot_be_sampled_is_refused_by_name(cascade, arguments, words):
    with pytest.raises(InputError) as error:
        cascade.sample(**{"captions": CAPTIONS, **arguments})
    assert all(word in str(error.value) for word in words), error.value


def test_a_device_that_is_not_there_is_refused(cascade):
    with pytest.raises(InputError, match="device 'abacus' cannot be used here"):
        cascade.to("abacus")


# ---- the folder


@pytest.fixture(scope="module")
def saved(cascade, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cascades") / "saved"
    cascade.save(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_a_loaded_cascade_samples_the_same_bits(cascade, saved):
    loaded = Cascade.load(saved, device="cpu")
    first, second = cascade.sample(CAPTIONS, seed=4), loaded.sample(CAPTIONS, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.stages, second.stages, strict=True))
    assert loaded.describe() == cascade.describe()
    assert not any(module.training for stage in loaded.stages for module in stage.modules())


def test_the_folder_holds_a_manifest_and_one_safetensors_file_a_stage(cascade, saved):
    assert sorted(path.name for path in saved.iterdir()) == ["base.safetensors", "cascade.json", "sr_16.safetensors"]
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]
    text = (saved / "cascade.json").read_text()
    manifest = json.loads(text)
    assert (manifest["format"], manifest["version"]) == ("imagen-lightning cascade", 1)
    assert manifest["value_range"] == [-1, 1]
    base, sr = manifest["stages"]
    assert (base["name"], base["image_size"], base["low_res_size"], base["aug_level"]) == ("base", 8, None, None)
    assert (sr["name"], sr["image_size"], sr["low_res_size"], sr["aug_level"]) == ("sr_16", 16, 8, 0.1)
    assert sr["text"] == {"encoder": "tiny-bytes-d12-s0", "max_tokens": 16, "null_text": "learned"}
    assert sr["stage"]["init_args"]["network"]["class_path"] == "imagen_lightning.networks.EfficientUNet"
    assert base["weights"]["num_parameters"] == sum(p.numel() for p in cascade.stages[0].parameters())
    assert str(saved.parent) not in text
    keys = load_file(saved / "sr_16.safetensors").keys()
    assert "null_embedding" in keys
    assert any(key.startswith("text_network.") for key in keys)


def test_files_are_readable_by_whom_the_umask_allows(cascade, tmp_path):
    before = os.umask(0o027)
    try:
        cascade.save(tmp_path / "shared")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "shared").iterdir()} == {0o640}


def test_stages_with_equal_text_encoders_share_one(tmp_path):
    text = TextSettings(TinyTextEncoder(dim=16, max_tokens=16))
    sr = SuperResolutionStage(16, 8, EfficientUNet(**SMALL, attention=["none", "none"]), text=text)
    Cascade([base_stage(), sr]).save(tmp_path / "equal")
    base, sr = Cascade.load(tmp_path / "equal").stages
    assert base.text.encoder is sr.text.encoder


def test_tables_learned_variance_and_lists_of_steps_survive_the_folder(tmp_path):
    stage = BaseStage(
        8,
        UNet(**{**SMALL, "text_dim": None}, attention=[False, True], out_channels=6),
        diffusion=Diffusion(
            DiscreteSchedule("squaredcos_cap_v2"), Epsilon(), P2(0.5), LogNormalTimes(), LearnedRange(0.002)
        ),
        sampling=Sampling(
            DDPM("learned"), 27, spacing=ListedTimes("fast27"), guidance_interval=(0.1, 5.0), guidance_rescale=0.3
        ),
    )
    cascade = Cascade([randomised(stage)])
    cascade.save(tmp_path / "cascade")
    again = Cascade.load(tmp_path / "cascade")
    assert again.stages[0].hyperparameters() == stage.hyperparameters()
    assert torch.equal(again.sample("").images, cascade.sample("").images)
    assert not torch.equal(again.sample("", sampler="ddpm").images, cascade.sample("").images)


def test_metrics_survive_loading_and_saving(saved, tmp_path):
    loaded = Cascade.load(saved)
    loaded.metrics.append({"name": "FID", "value": 12.5, "protocol": {"num_images": 30000}})
    loaded.save(tmp_path / "again")
    assert Cascade.load(tmp_path / "again").metrics == loaded.metrics


def test_saving_takes_a_new_or_empty_folder_and_leaves_nothing_half_written(cascade, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    cascade.save(tmp_path / "empty")
    Cascade.load(tmp_path / "empty")
    with pytest.raises(InputError, match=r"empty' is there already and not empty"):
        cascade.save(tmp_path / "empty")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file"):
        cascade.save(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written"):
        cascade.save(tmp_path / "file" / "below")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("imagen_lightning.cascade.weights.write_tensors", fail)
    with pytest.raises(InputError, match="No space left"):
        cascade.save(tmp_path / "full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def edit(folder, change):
    manifest = json.loads((folder / "cascade.json").read_text())
    change(manifest)
    (folder / "cascade.json").write_text(json.dumps(manifest))


def editing(*path_and_value):
    *path, last, value = path_and_value

    def change(folder):
        def put(manifest):
            for key in path:
                manifest = manifest[key]
            manifest[last] = value

        edit(folder, put)

    return change


def rewrite(change):
    def tamper(folder):
        tensors = load_file(folder / "base.safetensors")
        change(tensors)
        save_file(tensors, folder / "base.safetensors")

    return tamper


def flip_last_byte(folder):
    data = bytearray((folder / "base.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "base.safetensors").write_bytes(data)


STAGE = ("stages", 0, "stage")
DAMAGE = [
    (editing("version", 2), ["version 2 is unknown", "reads 1"]),
    (editing("format", "diffusers"), ["not the manifest of a cascade"]),
    (editing("value_range", [0, 1]), ["value_range [0, 1] is unknown", "[-1.0, 1.0]"]),
    (editing("resize", {"down": "bicubic", "up": "bilinear"}), ["resize", "bicubic", "area"]),
    (editing("stages", []), ["damaged"]),
    (editing("stages", 0, {"name": "base"}), ["damaged"]),
    (editing(*STAGE, "class_path", "os.system"), ["'os.system' is not part of", "--trust os"]),
    (
        editing(*STAGE, "init_args", "network", {"class_path": "evil.Net", "init_args": {}}),
        ["evil.Net", "--trust evil"],
    ),
    (
        editing(*STAGE, "class_path", "imagen_lightning.networks.UNet"),
        ["networks.UNet' must be"],
    ),
    (editing(*STAGE, "class_path", "imagen_lightning.Nothing"), ["imagen_lightning.Nothing", "not a part of a stage"]),
    (editing(*STAGE, "init_args", "diffusion", 5), ["stage 'base'", "diffusion 5 must be", "Diffusion"]),
    (
        editing(*STAGE, "init_args", "sampling", {"num_steps": 5}),
        ["stage 'base'", "sampling {'num_steps': 5} must be"],
    ),
    (editing(*STAGE, "init_args", "steps", 5), ["stage 'base'", "steps"]),
    (editing(*STAGE, "init_args", "image_size", 16), ["image_size is 8", "give 16"]),
    (editing("stages", 0, "text", "encoder", "t5"), ["text.encoder is 't5'", "tiny-bytes-d16-s0"]),
    (editing("stages", 1, "low_res_size", 4), ["low_res_size is 4", "give 8"]),
    (editing(*STAGE, "init_args", "network", "init_args", "multipliers", [1, 3]), ["has shape", "the stage needs"]),
    (editing("stages", 0, "weights", "file", "../base.safetensors"), ["'../base.safetensors'", "must be"]),
    (editing("stages", 0, "weights", "file", "base.ckpt"), ["'base.ckpt'", ".safetensors"]),
    (lambda folder: (folder / "cascade.json").write_text("{"), ["cascade.json is damaged"]),
    (lambda folder: (folder / "cascade.json").write_bytes(b"\xff\xfe{}"), ["cascade.json is damaged"]),
    (lambda folder: (folder / "cascade.json").unlink(), ["is no cascade folder"]),
    (lambda folder: (folder / "base.safetensors").unlink(), ["base.safetensors", "missing"]),
    (lambda folder: (folder / "base.safetensors").write_bytes(b""), ["base.safetensors", "damaged"]),
    (lambda folder: (folder / "base.safetensors").write_bytes(b"\x80\x04" * 99), ["base.safetensors", "damaged"]),
    (flip_last_byte, ["base.safetensors", "SHA-256"]),
    (rewrite(lambda tensors: tensors.pop("network.conv_in.bias")), ["lack 'network.conv_in.bias'"]),
    (rewrite(lambda tensors: tensors.update(extra=torch.ones(1))), ["'extra'"]),
    (
        rewrite(lambda tensors: tensors.update({"network.conv_in.bias": torch.ones(5)})),
        ["'network.conv_in.bias' has shape (5,)", "(8,)"],
    ),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_a_folder_that_cannot_be_trusted_is_refused_by_name(copy, damage, words):
    damage(copy)
    with pytest.raises(InputError) as error:
        Cascade.load(copy)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("folder", ["http://example.org/cascade", "s3://bucket/cascade", "no/such/folder"])
def test_what_is_no_local_cascade_is_refused(folder):
    with pytest.raises(InputError, match="is an address" if "://" in folder else "is no cascade folder"):
        Cascade.load(folder)


def test_a_users_own_network_needs_their_trust(tmp_path, monkeypatch):
    (tmp_path / "their_lab.py").write_text(
        "from imagen_lightning.networks import UNet\nclass TheirUNet(UNet):\n    '''Their own.'''\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import their_lab

    own = Cascade(
        [randomised(BaseStage(8, their_lab.TheirUNet(**SMALL | {"text_dim": None}, attention=[False, True])))]
    )
    own.save(tmp_path / "own")
    with pytest.raises(InputError, match=r"stage 'base' of .*'their_lab.TheirUNet'.* pass --trust their_lab"):
        Cascade.load(tmp_path / "own")
    loaded = Cascade.load(tmp_path / "own", trust=["their_lab"])
    assert type(loaded.stages[0].network) is their_lab.TheirUNet
    assert torch.equal(loaded.sample("x", steps=2).images, own.sample("x", steps=2).images)


# ---- starting a stage from a cascade


def test_a_stage_starts_from_a_cascades_weights(cascade, saved):
    for name in ("sr_16", "1"):
        stage = sr_stage()
        load_weights(stage, f"{saved}#{name}")
        wanted = cascade.stages[1].state_dict()
        assert all(torch.equal(value, wanted[key]) for key, value in stage.state_dict().items())


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("{}", ["names no stage", "#base"]),
        ("{}#sr_64", ["'sr_64' is unknown", "0 (base), 1 (sr_16)"]),
        ("{}#base", ["stage 'base'", "lack", "another architecture"]),
        ("{}/none#base", ["is no cascade folder"]),
        ("https://example.org/cascade#base", ["is an address"]),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_leave_the_stage(saved, reference, words):
    stage = sr_stage()
    before = {key: value.clone() for key, value in stage.state_dict().items()}
    with pytest.raises(InputError) as error:
        load_weights(stage, reference.format(saved))
    assert all(word in str(error.value) for word in words), error.value
    assert all(torch.equal(value, before[key]) for key, value in stage.state_dict().items())


# ---- checkpoints


def fit(stage, path):
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        default_root_dir=path.parent,
    )
    trainer.fit(stage, datamodule=ShapesDataModule(image_size=stage.image_size, batch_size=2))
    trainer.save_checkpoint(path)
    return stage


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    stages = []
    for name, stage in (("base", base_stage()), ("sr", sr_stage())):
        path = folder / name / "checkpoints" / "step-2.ckpt"
        path.parent.mkdir(parents=True)
        stages.append(fit(randomised(stage), path))
    return folder, stages


@pytest.mark.parametrize("names", [("base", "sr"), ("base/checkpoints/step-2.ckpt", "sr/checkpoints/step-2.ckpt")])
def test_trained_stages_become_a_cascade(trained, tmp_path, names):
    folder, stages = trained
    made = Cascade.from_checkpoints([folder / name for name in names])
    assert made.names == ["base", "sr_16"]
    assert torch.equal(made.sample(CAPTIONS).images, Cascade(stages).sample(CAPTIONS).images)
    made.save(tmp_path / "cascade")
    assert torch.equal(Cascade.load(tmp_path / "cascade").sample("x").images, made.sample("x").images)


def test_a_run_folder_gives_its_latest_checkpoint(trained, tmp_path):
    source = trained[0] / "base" / "checkpoints" / "step-2.ckpt"
    checkpoint = torch.load(source, weights_only=True)
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for name, value, expected in (("last", 1.0, 1), ("step-10", 10.0, 10), ("step-9", 9.0, 10)):
        checkpoint["state_dict"]["network.conv_out.bias"] = torch.full((3,), value)
        torch.save(checkpoint, folder / f"{name}.ckpt")
        assert Cascade.from_checkpoints([folder.parent]).stages[0].network.conv_out.bias[0] == expected


class Payload:
    def __reduce__(self):
        return (open, ("executed", "w"))


def truncated(source, path):
    path.write_bytes(source.read_bytes()[:-200])


def with_a_flipped_bit(source, path):
    data = bytearray(source.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def changed(change):
    def write(source, path):
        checkpoint = torch.load(source, weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, path)

    return write


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda source, path: None, ["does not exist"]),
        (lambda source, path: path.touch(), ["is empty"]),
        (lambda source, path: path.mkdir(), ["has no checkpoints/step-*.ckpt"]),
        (truncated, ["cannot be read", "damaged"]),
        (with_a_flipped_bit, ["cannot be read", "damaged", "checksum"]),
        (lambda source, path: path.write_bytes(b"not a checkpoint"), ["cannot be read", "damaged"]),
        (lambda source, path: torch.save({"state_dict": Payload()}, path), ["never unpickled"]),
        (
            lambda source, path: torch.save({"state_dict": {}, "epoch": 1}, path),
            ["not one of an imagen-lightning stage"],
        ),
        (lambda source, path: torch.save(torch.ones(2), path), ["not one of an imagen-lightning stage"]),
        (changed(lambda c: c.update(stage_class="their_lab.Stage")), ["their_lab.Stage", "--trust their_lab"]),
        (changed(lambda c: c["state_dict"].pop("network.conv_out.bias")), ["lack 'network.conv_out.bias'"]),
        (changed(lambda c: c["hyper_parameters"].pop("network")), ["network"]),
    ],
)
def test_a_bad_checkpoint_is_refused_by_name(trained, tmp_path, monkeypatch, write, words):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.ckpt"
    write(trained[0] / "base" / "checkpoints" / "step-2.ckpt", path)
    with pytest.raises(InputError) as error:
        Cascade.from_checkpoints([path])
    assert all(word in str(error.value) for word in ["bad.ckpt", *words]), error.value
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("address", ["http://x.org/a.ckpt", "https://x.org/a.ckpt", "s3://b/a.ckpt", "file:///a.ckpt"])
def test_an_address_is_no_checkpoint(address):
    with pytest.raises(InputError, match=f"checkpoint '{address}' is an address"):
        Cascade.from_checkpoints([address])


def test_importing_the_package_imports_no_torch():
    code = "import sys, imagen_lightning; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    import imagen_lightning

    assert imagen_lightning.Cascade is Cascade
    with pytest.raises(AttributeError, match="Kaskade"):
        _ = imagen_lightning.Kaskade


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, 2**70, 1.5, None, "abc", [0, -1, 2], [0, 1, 2.5]])
def test_a_seed_out_of_range_is_refused_and_never_wrapped(cascade, seed):
    with pytest.raises(InputError, match=r"seed .* is not a whole number in \[0, 2\^63\)"):
        cascade.sample(CAPTIONS, seed=seed)


def test_seeds_are_taken_up_to_the_largest(cascade):
    last = cascade.sample(CAPTIONS[:1], seed=2**63 - 1, steps=1)
    assert torch.equal(last.images, cascade.sample(CAPTIONS[:1], seed=torch.tensor([2**63 - 1]), steps=1).images)
    assert not torch.equal(last.images, cascade.sample(CAPTIONS[:1], seed=0, steps=1).images)
