"""Weights of a cascade: built without, loaded in any type, from one file or several, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from imagen_lightning.cascade import Cascade, load_weights
from imagen_lightning.cascade.description import build_stage, without_weights
from imagen_lightning.cascade.weights import put_tensors
from imagen_lightning.networks import PatchTransformer
from imagen_lightning.stages import BaseStage, Execution
from imagen_lightning.text import PseudoTokens
from imagen_lightning.types import InputError

CAPTIONS = ["a small red star", "a cross"]
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def same_bits(one, other):
    ones, others = one.state_dict(), other.state_dict()
    assert ones.keys() == others.keys()
    for key, value in ones.items():
        assert value.dtype == others[key].dtype, key
        assert torch.equal(value, others[key]), key


# ---- built without weights


def test_a_stage_is_built_without_weights(cascade):
    for stage in cascade.stages:
        description = {
            "class_path": f"imagen_lightning.stages.{type(stage).__name__}",
            "init_args": stage.hyperparameters(),
        }
        built = build_stage(description, (), "it", [value.shape for value in stage.state_dict().values()])
        assert built.state_dict().keys() == stage.state_dict().keys()
        assert all(parameter.is_meta for parameter in built.parameters())
        assert [p.requires_grad for p in built.parameters()] == [p.requires_grad for p in stage.parameters()]
        assert built.hyperparameters() == stage.hyperparameters()
    assert not any(parameter.is_meta for parameter in nn.Linear(2, 2).parameters())


def test_weights_shared_by_two_layers_stay_shared_and_layouts_stay():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.conv = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
            self.norm = nn.BatchNorm1d(3)

    torch.manual_seed(0)
    plain = Tied()
    plain.norm.running_mean += 2
    with without_weights():
        lean = Tied()
    put_tensors(lean, {key: value.clone() for key, value in plain.state_dict().items()})
    same_bits(plain, lean)
    assert lean.first.weight is lean.second.weight
    assert lean.first.bias is not lean.second.bias
    assert lean.conv.weight.stride() == plain.conv.weight.stride() != plain.conv.weight.contiguous().stride()
    assert sum(p.numel() for p in lean.parameters()) == sum(p.numel() for p in plain.parameters())


THEIRS = """
import torch
from imagen_lightning.networks import UNet

class Asks(UNet):
    def __init__(self, dim=8):
        super().__init__(dim, (1, 2), 1, (False, True), groups=4, head_dim=8)
        self.largest = float(self.conv_in.weight.detach().abs().max())

class Keeps(UNet):
    def __init__(self, dim=8):
        super().__init__(dim, (1, 2), 1, (False, True), groups=4, head_dim=8)
        self.register_buffer("table", torch.zeros_like(self.conv_in.weight), persistent=False)

    def forward(self, *inputs):
        return super().forward(*inputs) + self.table.sum()

class Stores(UNet):
    def __init__(self, dim=8):
        super().__init__(dim, (1, 2), 1, (False, True), groups=4, head_dim=8)
        self.register_buffer("table", self.conv_in.weight.detach() * 2)

    def forward(self, *inputs):
        return super().forward(*inputs) + self.table.sum()
"""


@pytest.mark.parametrize("name", ["Asks", "Keeps", "Stores"])
def test_a_network_that_needs_its_weights_while_it_is_made_has_them(name, tmp_path, monkeypatch):
    (tmp_path / f"lab_{name.lower()}.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(tmp_path)
    network = getattr(__import__(f"lab_{name.lower()}"), name)()
    own = Cascade([BaseStage(8, network).eval()])
    own.save(tmp_path / "own")
    loaded = Cascade.load(tmp_path / "own", trust=[f"lab_{name.lower()}"])
    same_bits(own.stages[0], loaded.stages[0])
    assert torch.equal(own.sample("x", steps=2).images, loaded.sample("x", steps=2).images)


def test_channels_last_weights_are_loaded_so(make_base, tmp_path):
    stage = make_base(execution=Execution(channels_last=True))
    cascade = Cascade([stage])
    cascade.save(tmp_path / "cascade")
    loaded = Cascade.load(tmp_path / "cascade")
    assert loaded.stages[0].network.conv_in.weight.stride() == stage.network.conv_in.weight.stride()
    assert torch.equal(loaded.sample(CAPTIONS).images, cascade.sample(CAPTIONS).images)


# ---- types


@pytest.mark.parametrize("dtype", HALVES)
def test_weights_are_cast_as_they_are_read_and_saved_as_they_are(cascade, saved, tmp_path, dtype):
    loaded = Cascade.load(saved, dtype=dtype)
    for stage, full in zip(loaded.stages, cascade.stages):
        wanted = {key: value.to(HALVES[dtype]) for key, value in full.state_dict().items()}
        assert all(torch.equal(value, wanted[key]) for key, value in stage.state_dict().items())
        assert {value.dtype for value in stage.state_dict().values()} == {HALVES[dtype]}
    loaded.save(tmp_path / "half")
    again, back = Cascade.load(tmp_path / "half"), Cascade.load(tmp_path / "half", dtype="float32")
    for stage, half, full in zip(loaded.stages, again.stages, back.stages):
        same_bits(stage, half)
        same_bits(half.float(), full)
    half, full = (folder / "base.safetensors" for folder in (tmp_path / "half", saved))
    assert half.stat().st_size < 0.6 * full.stat().st_size


@pytest.mark.parametrize("dtype", HALVES)
def test_half_weights_draw_nearly_the_same_picture(cascade, saved, dtype):
    full, half = cascade.sample(CAPTIONS), Cascade.load(saved, dtype=dtype).sample(CAPTIONS)
    for one, other in zip(full.stages, half.stages, strict=True):
        difference = (one.float() - other.float()).abs()
        assert 0 < difference.mean() < 6
        assert other.float().std() > 20


def test_half_weights_draw_nearly_the_same_picture_away_from_a_caption_and_with_every_network(make_sr, tmp_path):
    network = PatchTransformer(32, 2, 2, 16, text_dim=16, low_res=True, head_dim=16)
    stage = make_sr()
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    stage.network = network
    cascade = Cascade([stage])
    cascade.save(tmp_path / "cascade")
    given = {"captions": CAPTIONS, "negative": "a star", "images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}
    half = Cascade.load(tmp_path / "cascade", dtype="bfloat16")
    assert 0 < (cascade.sample(**given).images.float() - half.sample(**given).images.float()).abs().mean() < 6


def test_pseudo_words_stay_float32(make_base, tmp_path):
    stage = make_base()
    tokens = PseudoTokens({"<zib>": 2}, init="star")
    tokens.attach(stage.text.encoder)
    tokens.begin(stage.text.encoder)
    stage.attach_tokens(tokens)
    Cascade([stage]).save(tmp_path / "cascade")
    half = Cascade.load(tmp_path / "cascade", dtype="bfloat16")
    assert torch.equal(half.stages[0].tokens.vectors["<zib>"], tokens.vectors["<zib>"])
    assert half.stages[0].network.conv_in.weight.dtype == torch.bfloat16
    full = Cascade([stage]).sample("a <zib>").images.float()
    assert 0 < (half.sample("a <zib>").images.float() - full).abs().mean() < 6


def test_an_unknown_type_is_refused(saved):
    with pytest.raises(InputError, match=r"dtype 'int8' is unknown; use one of float32, bfloat16, float16"):
        Cascade.load(saved, dtype="int8")


def test_a_stage_with_weights_keeps_its_type_and_its_parameters(make_base, saved, tmp_path):
    Cascade.load(saved, dtype="bfloat16").save(tmp_path / "half")
    stage = make_base(seed=9)
    before = dict(stage.named_parameters())
    load_weights(stage, f"{tmp_path / 'half'}#base")
    assert all(stage.get_parameter(key) is value for key, value in before.items())  # an optimizer's are still these
    wanted = load_file(tmp_path / "half" / "base.safetensors")
    assert all(torch.equal(value, wanted[key].float()) for key, value in stage.state_dict().items())
    assert {value.dtype for value in stage.state_dict().values()} == {torch.float32}


# ---- several files


def test_weights_of_one_stage_may_be_several_files(cascade, saved, sharded):
    manifest = json.loads((sharded / "cascade.json").read_text())
    for entry, stage in zip(manifest["stages"], cascade.stages):
        names = [one["file"] for one in entry["weights"]["files"]]
        count = len(names)
        assert count > 3
        assert names == [f"{entry['name']}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        sizes = [sum(value.numel() * 4 for value in load_file(sharded / name).values()) for name in names]
        largest = max(value.numel() * 4 for value in stage.state_dict().values())
        assert all(size <= max(10_000, largest) for size in sizes)
        joined = {key: value for name in names for key, value in load_file(sharded / name).items()}
        assert joined.keys() == stage.state_dict().keys()
    loaded = Cascade.load(sharded)
    for one, other in zip(loaded.stages, cascade.stages):
        same_bits(one, other)
    loaded.save(sharded.parent / "joined")
    for name in ("cascade.json", "base.safetensors", "sr_16.safetensors"):
        assert (sharded.parent / "joined" / name).read_bytes() == (saved / name).read_bytes()


def test_several_files_start_a_stage_too(make_sr, cascade, sharded):
    stage = make_sr(seed=7)
    load_weights(stage, f"{sharded}#sr_16")
    same_bits(stage, cascade.stages[1])


def test_a_manifest_from_before_several_files_and_origins_still_loads(cascade, saved, edit):
    def as_before(manifest):
        for entry in manifest["stages"]:
            assert set(entry["weights"]) == {"file", "num_parameters", "sha256"}
            del entry["origin"]

    edit(saved, as_before)
    for one, other in zip(Cascade.load(saved).stages, cascade.stages):
        same_bits(one, other)


def first(folder):
    return sorted(folder.glob("base-*.safetensors"))[0]


def second(folder):
    return sorted(folder.glob("base-*.safetensors"))[1]


def remove(folder, edit):
    second(folder).unlink()


def forget(folder, edit):
    edit(folder, lambda manifest: manifest["stages"][0]["weights"]["files"].pop(1))


def repeat(folder, edit):
    tensors = load_file(second(folder))
    save_file(tensors | dict([next(iter(load_file(first(folder)).items()))]), second(folder))


def add(folder, edit):
    save_file(load_file(second(folder)) | {"extra": torch.ones(1)}, second(folder))


def reshape(folder, edit):
    save_file({key: value[..., :1].contiguous() for key, value in load_file(first(folder)).items()}, first(folder))


def exchange(folder, edit):
    data = bytearray(second(folder).read_bytes())
    data[-1] ^= 1
    second(folder).write_bytes(data)


def no_digest(folder, edit):
    edit(folder, lambda manifest: manifest["stages"][0]["weights"]["files"][1].pop("sha256"))


def elsewhere(folder, edit):
    shutil.copy(second(folder), folder.parent / "stray.safetensors")
    edit(folder, lambda manifest: manifest["stages"][0]["weights"]["files"][1].update(file="../stray.safetensors"))


def empty(folder, edit):
    edit(folder, lambda manifest: manifest["stages"][0]["weights"].update(files=[]))


def text(folder, edit):
    edit(folder, lambda manifest: manifest["stages"][0]["weights"].update(files="base.safetensors"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove, ["base-00002-of-", "missing"]),
        (forget, ["weights of stage 'base'", "lack", "more", "another architecture"]),
        (repeat, ["is in both 'base-00001-of-", "and 'base-00002-of-"]),
        (add, ["'extra'", "beyond the stage's"]),
        (reshape, ["has shape", "the stage needs"]),
        (exchange, ["base-00002-of-", "SHA-256 differs"]),
        (no_digest, ["base-00002-of-", "SHA-256 differs"]),
        (elsewhere, ["'../stray.safetensors'", "must be a .safetensors file in"]),
        (empty, ["cascade.json is damaged", "weights"]),
        (text, ["cascade.json is damaged", "weights"]),
    ],
)
def test_several_files_that_do_not_fit_are_refused_by_name(sharded, edit, damage, words):
    damage(sharded, edit)
    with pytest.raises(InputError) as error:
        Cascade.load(sharded)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_a_size_of_files_must_be_positive(cascade, tmp_path):
    with pytest.raises(InputError, match="max_shard_size 0"):
        cascade.save(tmp_path / "none", max_shard_size=0)
    assert not list(tmp_path.iterdir())
