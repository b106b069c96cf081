"""`finetune-report`: one page of what was learned, forgotten and copied; nothing drawn twice; refusals of one line."""

import json
import os
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from imagen_lightning.cascade import Cascade
from imagen_lightning.cli.main import main
from imagen_lightning.data.shapes import sample
from imagen_lightning.diffusion.random import seeded_generator
from imagen_lightning.evaluation.image_set import reduce
from imagen_lightning.finetuning import evidence_schema
from imagen_lightning.images import to_pil
from imagen_lightning.metrics.protocol import Value
from imagen_lightning.networks import EfficientUNet, UNet
from imagen_lightning.stages import BaseStage, Sampling, SuperResolutionStage, TextSettings
from imagen_lightning.text import TinyTextEncoder

SMALL = {"dim": 8, "multipliers": [1, 2], "num_blocks": 1, "head_dim": 8, "groups": 4, "text_dim": 16}


def stages(seed=0, size=8, guidance=2.0):
    text = TextSettings(TinyTextEncoder(dim=16, max_tokens=64))
    network = UNet(**SMALL, attention=[False, True])
    base = BaseStage(size, network, text=text, sampling=Sampling(num_steps=2, guidance=guidance))
    enlarging = EfficientUNet(**SMALL, attention=["none", "cross"])
    sr = SuperResolutionStage(2 * size, size, enlarging, text=text, sampling=Sampling(num_steps=1, guidance=1.0))
    for number, stage in enumerate((base, sr)):
        for parameter in stage.parameters():
            nn.init.normal_(parameter, std=0.15, generator=seeded_generator(seed, 0, number))
    return [base, sr]


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Cascades of random weights, 8 -> 16 px, "before" and "after", of which the base alone differs."""
    monkeypatch.chdir(tmp_path)
    before, after = stages(), stages()
    with torch.no_grad():
        next(after[0].parameters()).add_(0.3)
    after[0].origin = {"licence": "CC0", "base model": "before"}
    Cascade(before).save("before")
    Cascade(after).save("after")
    return tmp_path


@pytest.fixture
def shards(pair):
    """30 shapes to train on and 24 held out, as shards of 16 px images with captions of the shapes' grammar."""
    for split, count in (("train", 30), ("held_out", 24)):
        folder = pair / f"{split}_images"
        folder.mkdir()
        for number in range(count):
            image, caption = sample(0, number, split)
            to_pil(image).save(folder / f"{number:03d}.png")
            (folder / f"{number:03d}.txt").write_text(caption)
        assert main(["shards", "write", str(folder), str(pair / split)]) == 0
    return pair


def run(*arguments):
    return main(["finetune-report", "before", "after", *arguments])


FULL = ("--data", "held_out", "--train", "train", "--before-data", "shapes", "--num", "24", "--out", "out/page.html")


def test_the_page_and_all_behind_it(shards, capsys):
    (shards / "own.txt").write_text("a small red star on a white background\n")
    assert run(*FULL, "--prompts", "own.txt") == 0
    out = capsys.readouterr().out
    found = evidence_schema.load(shards / "out/page.json")
    assert found.verdict in out
    assert found.new.sentence in out
    assert found.copying["sentence"] in out
    for part in (found.new, found.old):
        assert part.judge == "caption accuracy"  # of shards too, whose captions are in the shapes' grammar
        assert [(row.stage, row.input) for row in part.before] == [
            ("base", None), ("sr_16", "real"), ("sr_16", "chain")
        ]  # fmt: skip
        assert [row.stage for row in part.real] == ["real images, 8 px", "real images, 16 px"]
        kinds = {item["metric"]: item["confidence"] for item in part.differences}
        assert kinds["caption accuracy"] == "95% Newcombe, paired"
        assert kinds["FD-random"] == "95% paired bootstrap"
        for item in part.differences:
            assert float(item["value"]) == pytest.approx(float(item["after"]) - float(item["before"]))
        value = Value.from_json(next(v for v in part.after[-1].values if v["metric"] == "FD-random"))
        assert value.protocol.num_samples == part.num == 24
    # The enlargement of real images has not changed, and the base has.
    assert found.new.before[1].values == found.new.after[1].values
    assert found.new.before[0].values != found.new.after[0].values
    base, sr = found.stages
    assert 0 < base["changed"] < base["parameters"]
    assert sr["changed"] == 0
    assert base["origin"] == {"before": None, "after": {"licence": "CC0", "base model": "before"}}
    assert {row["what"] for row in found.copying["rows"]} == {
        "held-out captions", "captions trained on", "held-out images"
    }  # fmt: skip
    assert {row["space"] for row in found.copying["rows"]} == {"pixels", "random-conv-0", "pixels and features"}
    assert [grid["title"] for grid in found.grids] == [
        "Pictures of own captions", "Pictures of the new domain", "Pictures from before"
    ]  # fmt: skip
    assert found.grids[0]["cells"][0]["real"] is None
    for name in found.pictures():
        assert (shards / "out/page" / name).is_file()
    page = (shards / "out/page.html").read_text()
    assert "licence CC0" in page
    assert "95% paired bootstrap" in page
    assert page.count("data:image/") >= 12
    assert "http" not in page.split("<body")[1].replace("http-equiv", "")


def test_nothing_is_drawn_twice(shards, monkeypatch):
    assert run(*FULL) == 0
    first = json.loads((shards / "out/page.json").read_text())
    lost = next((shards / "out/page/samples").glob("sr_16-chain-*/00003.png"))
    lost.unlink()
    calls = []
    sample_ = Cascade.sample
    monkeypatch.setattr(Cascade, "sample", lambda *given, **named: calls.append(1) or sample_(*given, **named))
    assert run(*FULL) == 0
    assert len(calls) == 1
    again = json.loads((shards / "out/page.json").read_text())
    for part in ("copying", "grids", "stages", "verdict"):
        assert again[part] == first[part]
    for part in ("new", "old"):
        assert again[part]["differences"] == first[part]["differences"]
    assert lost.is_file()


@pytest.mark.slow
def test_two_processes_find_the_same(shards):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "imagen_lightning",
        "finetune-report",
        "before",
        "after",
        *FULL,
        "--batch-size",
        "5",
    ]
    started = [subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank)}) for rank in range(2)]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    together = json.loads((shards / "out/page.json").read_text())
    shutil.rmtree("out")
    assert run(*FULL, "--batch-size", "5") == 0
    alone = json.loads((shards / "out/page.json").read_text())
    for part in ("copying", "grids", "stages", "verdict"):
        assert together[part] == alone[part]
    for part in ("new", "old"):
        assert together[part]["differences"] == alone[part]["differences"]


def test_another_comparison_s_folder_is_refused(shards, capsys):
    assert run(*FULL) == 0
    capsys.readouterr()
    assert run(*FULL, "--seed", "1") == 2
    assert "its seed is 0, this one's 1" in capsys.readouterr().err
    shutil.rmtree("after")
    Cascade(stages(seed=3)).save("after")
    assert run(*FULL) == 2
    assert "its after_sha256 is" in capsys.readouterr().err


def test_the_same_cascade_twice_shows_that_nothing_was_trained(pair, capsys):
    arguments = ["--data", "shapes", "--num", "4", "--out", "page.html"]
    assert main(["finetune-report", "before", "before", *arguments]) == 0
    found = evidence_schema.load(pair / "page.json")
    assert "nothing was trained" in found.verdict
    assert all(float(item["value"]) == 0 for item in found.new.differences if item["low"] is not None)
    page = (pair / "page.html").read_text()
    assert "was not measured: give --before-data" in page
    assert "give --train" in page


def test_captions_of_what_it_could_do(pair):
    (pair / "old.txt").write_text("a small red star on a white background\na large blue ring on a black background\n")
    assert run("--data", "shapes", "--num", "4", "--before-prompts", "old.txt", "--out", "page.html") == 0
    old = evidence_schema.load(pair / "page.json").old
    assert (old.num, old.judge, old.real) == (2, "caption accuracy", ())
    (pair / "words.txt").write_text("a dog\na cat\n")
    assert run("--data", "shapes", "--num", "4", "--before-prompts", "words.txt", "--out", "words.html") == 0
    old = evidence_schema.load(pair / "words.json").old
    assert old.judge is None
    assert "give --clip" in old.sentence


def test_copies_of_training_images_are_found(shards, monkeypatch):
    """A cascade that draws its training images, with some noise."""
    images = reduce(torch.stack([sample(0, number, "train")[0] for number in range(30)]), 16)

    def copy(cascade, captions, **named):
        start = named["first_index"]
        noise = torch.randint(-2, 3, images.shape, generator=torch.Generator().manual_seed(0))
        own = (images + noise).clamp(0, 255).to(torch.uint8)[[k % 30 for k in range(start, start + len(captions))]]
        last = named["last_stage"]
        return SimpleNamespace(images=own if last else reduce(own, 8))

    monkeypatch.setattr(Cascade, "sample", copy)
    assert run(*FULL) == 0
    found = evidence_schema.load(shards / "out/page.json")
    assert "lie nearer to training images than held-out images do" in found.verdict
    near = next(value for value in found.copying["rows"][0]["values"] if value["metric"] == "near copies")
    assert near["low"] > 0.5


def test_training_images_among_the_held_out_ones_are_told(shards, capsys):
    assert run("--data", "train", "--train", "train", "--num", "24", "--out", "page.html") == 0
    found = evidence_schema.load(shards / "page.json")
    assert found.copying["leaks"] == 24
    assert "24 held-out images of 24 also stand among the training images" in (shards / "page.html").read_text()


def test_settings_of_sampling_that_differ_are_shown(pair):
    Cascade(stages(seed=1, guidance=3.0)).save("other")
    arguments = ["--data", "shapes", "--num", "4"]
    assert main(["finetune-report", "before", "other", *arguments, "--out", "own.html"]) == 0
    assert "Guidance" in (pair / "own.html").read_text()
    given = ["--guidance", "1.5", "--steps", "1"]
    assert main(["finetune-report", "before", "other", *arguments, *given, "--out", "same.html"]) == 0
    found = evidence_schema.load(pair / "same.json")
    assert [row.settings["guidance"] for row in found.new.before] == [
        row.settings["guidance"] for row in found.new.after
    ]
    assert found.new.before[-1].settings["guidance"] == [1.5, 1.5]
    assert ">Guidance<" not in (pair / "same.html").read_text()


def test_runs_and_adapters_tell_the_cost(pair):
    folder = pair / "runs/base"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"command": "imagen-lightning fit", "created": "2026-11-25"}))
    (folder / "config.yaml").write_text(
        "trainer: {max_steps: 100, precision: 32}\nmodel: {class_path: imagen_lightning.finetuning.from_cascade, "
        "init_args: {cascade: before, adapter: {class_path: imagen_lightning.networks.LoRA, init_args: {rank: 4}}}}\n"
    )
    (folder / "metrics.csv").write_text("step,throughput/seconds_per_step,train/loss\n49,0.5,1\n99,0.7,1\n")
    (folder / "adapter.safetensors").write_bytes(bytes(2048))
    arguments = ["--data", "shapes", "--num", "4", "--out", "page.html"]
    assert run(*arguments, "--run", "runs/base", "--adapter", "runs/base/adapter.safetensors") == 0
    cost, file = evidence_schema.load(pair / "page.json").runs
    assert (cost["steps"], cost["seconds_per_step"], cost["seconds"]) == (100, pytest.approx(0.6), pytest.approx(60))
    assert cost["settings"]["model.adapter.rank"] == "4"
    assert file == {"file": "runs/base/adapter.safetensors", "bytes": 2048}
    page = (pair / "page.html").read_text()
    assert "1:00" in page
    assert "2.0 KiB" in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data", "shapes", "--out", "page"), "must end in .html"),
        (("--data", "shapes", "--num", "1", "--out", "page.html"), "argument --num: '1' is outside [2, 1000000]"),
        (("--data", "nowhere.tar", "--out", "page.html"), "match no file"),
        (("--data", "shapes", "--train", "shapes", "--out", "page.html"), "drawn without end"),
        (("--data", "shapes", "--num", "4", "--train", "shapes:hourglass", "--out", "page.html"), "at least 20"),
        (("--data", "shapes", "--before-prompts", "nowhere.txt", "--out", "page.html"), "nowhere.txt"),
        (("--data", "shapes", "--run", "nowhere", "--out", "page.html"), "'nowhere' is no run folder"),
        (("--data", "shapes", "--adapter", "nowhere", "--out", "page.html"), "'nowhere' is no file"),
        (("--data", "shapes", "--guidance", "1,2,3", "--out", "page.html"), "guidance"),
    ],
)
def test_refusals_leave_nothing(pair, capsys, arguments, words):
    before = {path.name for path in pair.iterdir()}
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert {path.name for path in pair.iterdir()} == before


def test_cascades_of_other_stages_or_sizes_are_refused_by_name(pair, capsys):
    Cascade(stages()[:1]).save("alone")
    Cascade(stages(size=4)).save("smaller")
    arguments = ["--data", "shapes", "--num", "4", "--out", "page.html"]
    assert main(["finetune-report", "before", "alone", *arguments]) == 2
    error = capsys.readouterr().err
    assert "'before' has the stages base, sr_16, 'alone' base" in error
    assert main(["finetune-report", "before", "smaller", *arguments]) == 2
    error = capsys.readouterr().err
    assert "sr_16" in error
    assert "sr_8" in error
    for name, size in (("eight", 8), ("four", 4)):
        text = TextSettings(TinyTextEncoder(dim=16))
        Cascade([BaseStage(size, UNet(**SMALL, attention=[False, True]), text=text)]).save(name)
    assert main(["finetune-report", "eight", "four", *arguments]) == 2
    assert "stage 'base': image_size is 8 in 'eight' and 4 in 'four'" in capsys.readouterr().err
    assert main(["finetune-report", "nowhere", "before", *arguments]) == 2
    assert "'nowhere' is no cascade folder" in capsys.readouterr().err


def test_enlargement_alone(pair, capsys):
    for name in ("before", "after"):
        Cascade([Cascade.load(name).stages[1]]).save(f"{name}_sr")
    arguments = ["finetune-report", "before_sr", "after_sr", "--data", "shapes", "--num", "4", "--out", "page.html"]
    assert main(arguments) == 0
    found = evidence_schema.load(pair / "page.json")
    assert "PSNR" in {item["metric"] for item in found.new.differences}
    (pair / "prompts.txt").write_text("a dog\n")
    assert main([*arguments[:-1], "other.html", "--prompts", "prompts.txt"]) == 2
    assert "which needs images" in capsys.readouterr().err
