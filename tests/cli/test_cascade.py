"""The verb `cascade` with adapters, pseudo-words and other cascades' stages."""

import hashlib
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from imagen_lightning.cascade import Cascade
from imagen_lightning.cli.main import main
from imagen_lightning.finetuning import adapters, from_cascade
from imagen_lightning.images import from_pil
from imagen_lightning.networks import EfficientUNet, LoRA, UNet, lora
from imagen_lightning.stages import BaseStage, Sampling, SuperResolutionStage, TextSettings
from imagen_lightning.text import PseudoTokens, TinyTextEncoder
from imagen_lightning.text.token_files import save_tokens

SMALL = {"dim": 8, "multipliers": [1], "num_blocks": 1, "head_dim": 8, "groups": 4}
CAPTIONS = ["a red star", "a blue ring"]


def randomised(stage, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in stage.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return stage.eval()


def base_stage(seed=0):
    network = UNet(**SMALL, text_dim=8, attention=[True])
    return randomised(
        BaseStage(8, network, text=TextSettings(TinyTextEncoder(8)), sampling=Sampling(num_steps=2)), seed
    )


def sr_stage(low_res_size=8, image_size=16, text_dim=8, seed=1):
    text = TextSettings(TinyTextEncoder(text_dim))
    network = EfficientUNet(**SMALL, text_dim=text_dim, attention=["self"])
    sampling = Sampling(num_steps=2, guidance=1.0)
    return randomised(SuperResolutionStage(image_size, low_res_size, network, text=text, sampling=sampling), seed)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a cascade, whose base came from elsewhere."""
    monkeypatch.chdir(tmp_path)
    base = base_stage()
    base.origin = {"source": "elsewhere", "licence": "Elsewhere 1.0"}
    Cascade([base, sr_stage()]).save("cascade")
    return tmp_path


def adapter(name, stage, seed):
    """Writes an adapter for the stage, as training would have made one, and gives what it adds."""
    tuned = from_cascade("cascade", stage, adapter=LoRA(2, targets=["attention"]))
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora.adapter_parameters(tuned.network):
        parameter.data.normal_(0, 0.3, generator=generator)
    factors = lora.factors(tuned.network)
    adapters.save(adapters.Adapter(factors, adapters.base_identity(tuned)), name)
    return {f"network.{layer}.weight": each.delta(torch.float64) for layer, each in factors.items()}


def run(*arguments):
    return main(["cascade", *map(str, arguments)])


def refusal(capsys, *arguments):
    capsys.readouterr()
    assert run(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def weights(folder, name):
    return load_file(f"{folder}/{name}.safetensors")


def test_adapters_are_added_with_their_weights_to_the_stages_that_they_are_for(folder):
    first, second, third = adapter("first", "base", 1), adapter("second", "base", 2), adapter("third", "sr_16", 3)
    given = ["--adapter", "first@0.5", "--adapter", "base=second/adapter_model.safetensors@-2", "--adapter", "1=third"]
    assert run("cascade", "out", *given) == 0
    for name, parts in (("base", ((0.5, first), (-2, second))), ("sr_16", ((1, third),))):
        before, after = weights("cascade", name), weights("out", name)
        changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
        assert changed == parts[0][1].keys()
        for key in changed:
            wanted = before[key].double() + sum(weight * deltas[key] for weight, deltas in parts)
            torch.testing.assert_close(after[key].double(), wanted, rtol=1e-6, atol=1e-6)


def test_an_adapters_file_is_named_in_the_origin_beside_its_bases(folder, capsys):
    adapter("first", "base", 1)
    assert run("cascade", "out", "--adapter", "base=first@0.5") == 0
    base, sr = json.loads((folder / "out" / "cascade.json").read_text())["stages"]
    before, added = base["origin"]["parents"]
    assert before == {"origin": {"source": "elsewhere", "licence": "Elsewhere 1.0"}}
    digest = hashlib.sha256((folder / "first" / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert (added["weight"], added["adapter"]["name"]) == (0.5, "first")
    assert {"file": "adapter_model.safetensors", "sha256": digest} in added["adapter"]["files"]
    assert sr["origin"] is None
    assert capsys.readouterr().out.splitlines()[0].endswith(", licence Elsewhere 1.0")
    assert str(folder) not in (folder / "out" / "cascade.json").read_text()


def test_files_with_signs_in_their_names_are_files(folder):
    deltas = adapter("a=b@3", "base", 1)
    shutil.copytree("a=b@3", "with @1")
    for name, given, weight in (
        ("one", "a=b@3", 1),
        ("two", "base=a=b@3@2", 2),
        ("three", "a=b@3@-1", -1),
        ("four", "base=with @1", 1),
        ("five", "base=with @1@0.5", 0.5),
        ("six", f"{folder}/with @1@2", 2),
    ):
        assert run("cascade", name, "--adapter", given) == 0
        for key, delta in deltas.items():
            wanted = weights("cascade", "base")[key].double() + weight * delta
            torch.testing.assert_close(weights(name, "base")[key].double(), wanted, rtol=1e-6, atol=1e-6)


def test_adapters_that_do_not_fit_are_refused_in_one_line(folder, capsys):
    adapter("first", "base", 1)
    (folder / "evil").mkdir()
    (folder / "evil" / "adapter_model.bin").write_bytes(b"\x80\x04")
    assert "'none' does not exist" in refusal(capsys, "cascade", "out", "--adapter", "none")
    for weight in ("x", "nan", "inf", "-inf", "1e999"):
        line = refusal(capsys, "cascade", "out", "--adapter", f"base=first@{weight}")
        assert f"weight {weight!r} is not a finite number" in line
    assert "too large for torch.float32 weights" in refusal(capsys, "cascade", "out", "--adapter", "first@1e39")
    assert "stage 'sr_64' is unknown" in refusal(capsys, "cascade", "out", "--adapter", "sr_64=first")
    line = refusal(capsys, "cascade", "out", "--adapter", "sr_16=first")
    assert "adapter 'first': it is for a stage 'base'" in line
    assert "stage 'sr_16' has" in line
    assert "'evil' holds no adapter" in refusal(capsys, "cascade", "out", "--adapter", "base=evil")
    Cascade([base_stage(seed=5), sr_stage()]).save("other")
    line = refusal(capsys, "other", "out", "--adapter", "first")
    assert "--adapter first fits no stage: adapter 'first': it is for a stage 'base' with weights" in line
    assert not (folder / "out").exists()


def test_pseudo_words_are_given_to_the_stages_of_their_encoder(folder):
    words = PseudoTokens({"<zib>": 1}, init="star")
    encoder = TinyTextEncoder(8)
    words.attach(encoder)
    words.begin(encoder)
    with torch.no_grad():
        words.vectors["<zib>"].mul_(-1.5)
    save_tokens("zib.tokens.safetensors", words, encoder, licence="CC BY 4.0")
    assert run("cascade", "out", "--tokens", "zib.tokens.safetensors") == 0
    made = Cascade.load("out")
    assert [list(stage.tokens.words) for stage in made.stages] == [["<zib>"], ["<zib>"]]
    assert all(torch.equal(stage.tokens.vectors["<zib>"], words.vectors["<zib>"]) for stage in made.stages)
    before = Cascade.load("cascade")
    assert torch.equal(made.sample(CAPTIONS).images, before.sample(CAPTIONS).images)  # as long as nobody says it
    assert not torch.equal(made.sample("a <zib>").images, made.sample("a star").images)
    base, sr = json.loads((folder / "out" / "cascade.json").read_text())["stages"]
    assert base["origin"]["parents"][1]["words"] == ["<zib>"]
    assert sr["origin"]["parents"][0]["licence"] == "CC BY 4.0"
    assert made.describe().splitlines()[1].endswith(", licence CC BY 4.0")


def test_a_word_that_one_stage_alone_knows_is_refused_where_the_other_runs(folder):
    made = Cascade([base_stage(), sr_stage(text_dim=12)])
    made.save("mixed")
    words = PseudoTokens({"<zib>": 1}, init="star")
    words.attach(TinyTextEncoder(8))
    words.begin(TinyTextEncoder(8))
    save_tokens("zib.tokens.safetensors", words, TinyTextEncoder(8))
    assert run("mixed", "out", "--tokens", "zib.tokens.safetensors") == 0
    made = Cascade.load("out")
    with pytest.raises(
        ValueError, match=r"stage 'sr_16' does not know the pseudo-word '<zib>', which stage 'base' knows"
    ):
        made.sample("a <zib>")
    drawn = made.sample("a <zib>", last_stage=0)
    assert made.sample("a star", images=drawn.images, start_stage=1).images.shape == (1, 3, 16, 16)


def test_a_stage_joins_from_another_cascade_and_files_are_as_large_as_asked(folder, capsys):
    Cascade([base_stage(seed=7), sr_stage(seed=8)]).save("other")
    assert run("other#base", "cascade#1", "out", "--max-shard-size", "1e-5") == 0
    manifest = json.loads((folder / "out" / "cascade.json").read_text())
    assert all(len(entry["weights"]["files"]) > 1 for entry in manifest["stages"])
    assert torch.equal(
        Cascade.load("out").sample(CAPTIONS).images, Cascade([base_stage(seed=7), sr_stage()]).sample(CAPTIONS).images
    )
    assert "argument --max-shard-size: '0' is outside [1e-09," in refusal(
        capsys, "cascade", "more", "--max-shard-size", "0"
    )
    assert "argument --max-shard-size: 'nan' is outside" in refusal(
        capsys, "cascade", "more", "--max-shard-size", "nan"
    )
    assert "put it first" in refusal(capsys, "other#base", "cascade", "more")


def test_a_cascade_is_sampled_with_half_weights(folder):
    options = ["--prompt", "a red star", "--device", "cpu"]
    assert main(["sample", "cascade", *options, "--out", "full"]) == 0
    assert main(["sample", "cascade", *options, "--out", "half", "--dtype", "bfloat16"]) == 0
    records = [json.loads((folder / name / "samples.json").read_text()) for name in ("full", "half")]
    assert [record["dtype"] for record in records] == [None, "bfloat16"]
    full, half = (from_pil(Image.open(folder / name / "00000.png")).float() for name in ("full", "half"))
    assert 0 < (full - half).abs().mean() < 8
