"""The verbs `cascade` and `sample`: what they write, and refusals of one line with exit code 2."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from imagen_lightning.cascade import Cascade
from imagen_lightning.cli.main import main
from imagen_lightning.cli.sample import _own_folder
from imagen_lightning.images import from_pil, to_pil
from imagen_lightning.metrics.digests import digest_tensors
from imagen_lightning.networks import EfficientUNet, UNet
from imagen_lightning.samplers import DDPM
from imagen_lightning.stages import BaseStage, Sampling, SuperResolutionStage, TextSettings
from imagen_lightning.text import TinyTextEncoder
from imagen_lightning.types import InputError

SMALL = {"dim": 8, "multipliers": [1], "num_blocks": 1, "head_dim": 8, "groups": 4}


def stages(text_dim=8):
    text = TextSettings(TinyTextEncoder(dim=text_dim)) if text_dim else None
    base = BaseStage(8, UNet(**SMALL, text_dim=text_dim, attention=[False]), text=text, sampling=Sampling(num_steps=2))
    network = EfficientUNet(**SMALL, text_dim=text_dim, attention=["none"])
    sr = SuperResolutionStage(16, 8, network, text=text, sampling=Sampling(num_steps=2, guidance=1.0))
    generator = torch.Generator().manual_seed(0)
    for parameter in [*base.parameters(), *sr.parameters()]:
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return base, sr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cascades") / "cascade"
    Cascade(stages()).save(path)
    return path


def checkpoint(stage, path):
    held = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(held)
    torch.save(held, path)
    return str(path)


def refusal(capsys, *arguments):
    """The one line of stderr that ends with exit code 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("imagen-lightning: error: ")
    return line


def pictures(out):
    return [from_pil(Image.open(path)) for path in sorted(out.glob("0*.png"))]


# ---- sample


def test_sample_writes_pictures_a_grid_and_a_record(folder, tmp_path, capsys):
    out = tmp_path / "runs" / "out"
    (tmp_path / "captions.txt").write_text("ein grüner Kreis\n\na cross\n", encoding="utf-8")
    options = ["--prompts", str(tmp_path / "captions.txt"), "--num-images", "2", "--seed", "5", "--guidance", "3,1"]
    options += ["--steps", "3,2", "--sampler", "ddpm,ddim", "--aug-level", "0.2", "--batch-size", "4"]
    options += ["--negative-prompt", "a blue circle"]
    assert main(["sample", str(folder), "--prompt", "a red star", *options, "--out", str(out)]) == 0
    assert "10/10" in capsys.readouterr().err.replace("\r", "\n")  # two batches of 3 and of 2 steps
    names = [f"{index:05d}.png" for index in range(6)]
    assert sorted(path.name for path in out.iterdir()) == [*names, "grid.png", "samples.json"]

    captions = [caption for caption in ("a red star", "ein grüner Kreis", "a cross") for _ in range(2)]
    expected = Cascade.load(folder).sample(
        captions,
        seed=5,
        guidance=[3, 1],
        steps=[3, 2],
        sampler=[DDPM(), "ddim"],
        aug_level=0.2,
        negative="a blue circle",
        batch_size=4,
    )
    assert torch.equal(torch.stack(pictures(out)), expected.images)

    record = json.loads((out / "samples.json").read_text(encoding="utf-8"))
    assert record["cascade"] == str(folder)
    assert set(record["versions"]) == {"imagen_lightning", "torch"}
    base, sr = record["stages"]
    assert (base["stage"], base["steps"], base["guidance"], base["aug_level"]) == ("base", 3, 3, None)
    assert (sr["stage"], sr["steps"], sr["guidance"], sr["aug_level"]) == ("sr_16", 2, 1, 0.2)
    assert base["sampler"]["class_path"] == "imagen_lightning.samplers.DDPM"
    assert record["samples"][3] == {"file": "00003.png", "prompt": "ein grüner Kreis", "seed": 5, "index": 3}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", 'Category,Prompts\nA,"a star, red"\nB,a cross\n'),
        ("p.tsv", "Prompt\tCategory\na star, red\tA\na cross\tB\n"),
        ("p.jsonl", '{"tag": "A", "prompt": "a star, red"}\n{"prompt": "a cross"}\n'),
        ("p.txt", "a star, red\n\na cross\n"),
    ],
)
def test_prompt_sets_are_read_as_every_command_reads_them(folder, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert main(["sample", str(folder), "--prompts", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert [sample["prompt"] for sample in record["samples"]] == ["a star, red", "a cross"]


def test_the_grid_shows_every_stage(folder, tmp_path):
    assert main(["sample", str(folder), "--prompt", "a red star", "--out", str(tmp_path)]) == 0
    grid = from_pil(Image.open(tmp_path / "grid.png"))
    final = pictures(tmp_path)[0].repeat_interleave(12, dim=1).repeat_interleave(12, dim=2)  # 16 to 192 px
    assert torch.equal(grid[:, 4 : 4 + 192, 4 + 196 : 4 + 196 + 192], final)
    base = grid[:, 4 : 4 + 192, 4 : 4 + 192]
    assert torch.equal(base, base[:, ::24, ::24].repeat_interleave(24, dim=1).repeat_interleave(24, dim=2))
    assert (grid[:, 200:] < 128).any()  # the caption


def test_sampling_goes_on_from_a_picture(folder, tmp_path):
    chain = Cascade.load(folder).sample(["a red star"] * 2, seed=3)
    low = tmp_path / "low.png"
    to_pil(chain.stages[0][0]).save(low)
    command = ["sample", str(folder), "--prompt", "a red star", "--seed", "3", "--low-res", str(low)]
    for name, more in (("a", ["--start-stage", "1"]), ("b", ["--start-stage", "sr_16"]), ("c", ["--num-images", "2"])):
        assert main([*command, *more, "--out", str(tmp_path / name)]) == 0
        assert torch.equal(pictures(tmp_path / name)[0], chain.images[0])
    record = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert [stage["stage"] for stage in record["stages"]] == ["sr_16"]
    assert record["low_res"] == str(low)


def test_a_cascade_without_text_needs_no_prompt(tmp_path):
    Cascade(stages(text_dim=None)).save(tmp_path / "cascade")
    options = ["--num-images", "3", "--precision", "bf16", "--device", "cpu"]
    assert main(["sample", str(tmp_path / "cascade"), *options, "--out", str(tmp_path / "out")]) == 0
    assert len(pictures(tmp_path / "out")) == 3


def test_other_files_in_the_output_folder_stay(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["sample", str(folder), "--prompt", "x", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.png", "grid.png", "notes.txt", "samples.json"]


@pytest.mark.parametrize("name", ["samples.json", "00003.png", "grid.png"])
def test_earlier_samples_are_not_overwritten(folder, tmp_path, capsys, name):
    (tmp_path / name).write_text("earlier")
    line = refusal(capsys, "sample", folder, "--prompt", "x", "--out", tmp_path)
    assert name in line
    assert "another folder" in line
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--prompt or --prompts"]),
        (["--prompt", " "], ["--prompt number 1 is empty"]),
        (["--prompt", "x", "--prompt", "caf\udce9"], ["argument 'caf\\udce9' is not UTF-8"]),
        (["--prompt", "x", "--negative-prompt", "caf\udce9"], ["argument 'caf\\udce9' is not UTF-8"]),
        (["--prompts", "latin.txt"], ["'latin.txt' is not UTF-8 (byte 3)"]),
        (["--prompts", "blank.txt"], ["'blank.txt' holds no prompt"]),
        (["--prompts", "none.txt"], ["'none.txt' cannot be read"]),
        (["--prompt", "x", "--num-images", "0"], ["--num-images", "'0'", "[1, 1000000]"]),
        (["--prompt", "x", "--num-images", "two"], ["--num-images", "'two'"]),
        (["--prompt", "x", "--guidance", "3,high"], ["--guidance", "'high'"]),
        (["--prompt", "x", "--guidance", "3,1,1"], ["guidance has 3 values for 2 stages"]),
        (["--prompt", "x", "--steps", "0"], ["--steps", "'0'", "[1, 10000]"]),
        (["--prompt", "x", "--num-images", "1000000000"], ["'1000000000'", "[1, 1000000]"]),
        (["--prompt", "x", "--prompt", "y", "--num-images", "900000"], ["2 captions", "1,800,000 images", "1,000,000"]),
        (["--prompt", "x", "--seed", "-1"], ["'-1'", f"[0, {2**63 - 1}]"]),
        (["--prompt", "x", "--seed", str(2**64)], [f"'{2**64}'"]),
        (["--prompt", "x", "--sampler", "euler"], ["'euler' is unknown", "dpmpp"]),
        (["--prompt", "x", "--device", "abacus"], ["'abacus'"]),
        (["--prompt", "x", "--precision", "8"], ["--precision", "'8'"]),
        (["--prompt", "x", "--start-stage", "1"], ["8 px"]),
        (["--prompt", "x", "--start-stage", "sr_99"], ["'sr_99' is unknown"]),
        (["--prompt", "x", "--low-res", "none.png"], ["'none.png'", "no such file"]),
        (["--prompt", "x", "--low-res", "latin.txt"], ["'latin.txt'", "no picture"]),
        (["--prompt", "x", "--low-res", "wide.png"], ["20x10 px", "8x8"]),
        (["--prompt", "x", "--colour", "red"], ["--colour"]),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(folder, tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "blank.txt").write_text(" \n\n")
    Image.new("RGB", (20, 10)).save(tmp_path / "wide.png")
    before = sorted(tmp_path.iterdir())
    line = refusal(capsys, "sample", folder, *options, "--out", tmp_path / "out")
    assert all(word in line for word in words), line
    assert sorted(tmp_path.iterdir()) == before


def test_bad_folders_are_one_line(folder, tmp_path, capsys):
    assert "is no cascade folder" in refusal(capsys, "sample", tmp_path, "--prompt", "x", "--out", tmp_path / "out")
    assert "is an address" in refusal(capsys, "sample", "http://x.org/c", "--prompt", "x", "--out", tmp_path / "out")
    (tmp_path / "file").touch()
    for out, words in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "out", "cannot be written")):
        assert words in refusal(capsys, "sample", folder, "--prompt", "x", "--out", out)


@pytest.mark.parametrize("metrics", [3, ["FID"]])
def test_metrics_that_are_none_are_one_line(folder, tmp_path, capsys, metrics):
    broken = tmp_path / "cascade"
    shutil.copytree(folder, broken)
    manifest = json.loads((broken / "cascade.json").read_text())
    (broken / "cascade.json").write_text(json.dumps({**manifest, "metrics": metrics}))
    line = refusal(capsys, "sample", broken, "--prompt", "x", "--out", tmp_path / "out")
    assert "cascade.json is damaged: its metrics are not a list of objects" in line


def test_without_out_samples_go_to_the_next_free_folder(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("0001", "0002"):
        assert main(["sample", str(folder), "--prompt", "x"]) == 0
        assert f"Wrote 1 image, grid.png and samples.json to samples/{name}" in capsys.readouterr().out
        assert (tmp_path / "samples" / name / "00000.png").exists()


def test_two_at_once_share_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with _own_folder(None) as first, _own_folder(None) as second:
        assert [str(first), str(second)] == ["samples/0001", "samples/0002"]
        with pytest.raises(InputError, match=r"'samples/0001' is in use by process .*; give another folder"):
            _own_folder(Path("samples/0001")).__enter__()
    with pytest.raises(ZeroDivisionError), _own_folder(Path("deep/out")):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []  # where nothing was written
    with _own_folder(None) as first:
        (first / "samples.json").touch()
    assert [path.name for path in first.iterdir()] == ["samples.json"]


def test_the_record_says_all_that_made_the_images(folder, tmp_path):
    picture = Image.new("RGB", (8, 8), "red")
    picture.save(tmp_path / "low.png")
    command = ["sample", str(folder), "--prompt", "x", "--low-res", str(tmp_path / "low.png"), "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    cascade = Cascade.load(folder)
    (stage,) = record["stages"]
    (expected,) = [setting.described() for setting in cascade.settings()[1:]]
    assert {key: stage[key] for key in expected} == json.loads(json.dumps(expected))
    assert stage["sampling"]["thresholding"]["class_path"] == "imagen_lightning.diffusion.StaticThresholding"
    entry = json.loads((folder / "cascade.json").read_text())["stages"][1]
    assert stage["weights"] == {"kind": "not recorded", "sha256": [entry["weights"]["sha256"]]}
    assert stage["text"] == cascade.stages[1].text.encoder.identity()
    assert record["low_res_sha256"] == digest_tensors([from_pil(picture)])


# ---- cascade


def test_cascade_joins_checkpoints(tmp_path, capsys):
    paths = [checkpoint(stage, tmp_path / f"{number}.ckpt") for number, stage in enumerate(stages())]
    assert main(["cascade", *paths, str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "base: 8 px" in printed
    assert "sr_16: 8 -> 16 px" in printed
    expected = Cascade(stages()).sample("a red star").images
    assert torch.equal(Cascade.load(tmp_path / "out").sample("a red star").images, expected)
    assert "not empty" in refusal(capsys, "cascade", *paths, tmp_path / "out")


def test_what_is_no_cascade_is_one_line_and_leaves_nothing(tmp_path, capsys):
    base, sr = stages()
    paths = SimpleNamespace(
        base=checkpoint(base, tmp_path / "base.ckpt"),
        sr=checkpoint(sr, tmp_path / "sr.ckpt"),
        wide=checkpoint(SuperResolutionStage(64, 32, sr.network, sr.text), tmp_path / "wide.ckpt"),
    )
    (tmp_path / "empty.ckpt").touch()
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "out"
    assert "32 px" in refusal(capsys, "cascade", paths.base, paths.wide, out)
    assert "first" in refusal(capsys, "cascade", paths.sr, paths.base, out)
    assert "empty.ckpt' is empty" in refusal(capsys, "cascade", paths.base, tmp_path / "empty.ckpt", out)
    assert "none.ckpt' does not exist" in refusal(capsys, "cascade", tmp_path / "none.ckpt", out)
    assert "is an address" in refusal(capsys, "cascade", "https://x.org/base.ckpt", out)
    assert "OUT" in refusal(capsys, "cascade", paths.base)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("verb", ["sample", "cascade"])
def test_help_imports_no_torch(verb):
    code = (
        "import sys\nfrom imagen_lightning.cli.main import main\n"
        f"try:\n    main(['{verb}', '--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--trust" in done.stdout
