"""`evaluate`: the matrix, sweeps, the saved operating point, prompts, processes, going on, and refusals of one line."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from torch import nn

from imagen_lightning.cascade import Cascade
from imagen_lightning.cli.main import main
from imagen_lightning.diffusion.random import seeded_generator
from imagen_lightning.evaluation import schema
from imagen_lightning.metrics.protocol import Value
from imagen_lightning.networks import EfficientUNet, UNet
from imagen_lightning.stages import BaseStage, Sampling, SuperResolutionStage, TextSettings
from imagen_lightning.text import TinyTextEncoder

SMALL = {"dim": 8, "multipliers": [1, 2], "num_blocks": 1, "head_dim": 8, "groups": 4, "text_dim": 16}


@pytest.fixture
def cascade(tmp_path, monkeypatch):
    """A cascade of random weights, 8 -> 16 px, saved as "cascade" in the working folder."""
    monkeypatch.chdir(tmp_path)
    text = TextSettings(TinyTextEncoder(dim=16, max_tokens=64))
    base = BaseStage(8, UNet(**SMALL, attention=[False, True]), text=text, sampling=Sampling(num_steps=2, guidance=2.0))
    network = EfficientUNet(**SMALL, attention=["none", "cross"])
    sr = SuperResolutionStage(16, 8, network, text=text, sampling=Sampling(num_steps=1, guidance=1.0))
    for number, stage in enumerate((base, sr)):
        for parameter in stage.parameters():
            nn.init.normal_(parameter, std=0.15, generator=seeded_generator(0, 0, number))
    Cascade([base, sr]).save("cascade")
    return tmp_path


def run(*arguments):
    return main(["evaluate", "cascade", *(str(argument) for argument in arguments)])


def test_the_matrix(cascade, capsys):
    assert run("--data", "shapes", "--num", "6", "--out", "eval", "--batch-size", "4") == 0
    out = capsys.readouterr().out
    found = schema.load("eval")
    assert found.kind == "matrix"
    assert [(row.stage, row.input) for row in found.rows][:3] == [("base", None), ("sr_16", "chain"), ("sr_16", "real")]
    assert found.verdict in out
    assert "caption accuracy" in out
    for row in found.rows[:3]:
        assert (cascade / "eval" / row.samples).is_file()
        values = [Value.from_json(value) for value in row.values]
        distance = next(value for value in values if value.metric == "FD-random")
        protocol = distance.protocol
        assert protocol.extractor_sha256
        assert protocol.reference
        assert (protocol.num_samples, protocol.seed) == (6, 0)
        assert {protocol.weights} <= {"not recorded", ("not recorded", "not recorded")}
        assert distance.low <= distance.value <= distance.high
        assert row.seconds_per_image > 0
    assert found.environment["command"].startswith("imagen-lightning evaluate cascade --data shapes")
    assert {path.name for path in (cascade / "eval").iterdir() if path.name != ".lock"} == {
        "evaluation.json", "measured", "plan.json", "samples"
    }  # fmt: skip


def test_a_sweep_shares_the_base_and_saves_the_best_point(cascade, capsys):
    before = json.loads((cascade / "cascade" / "cascade.json").read_text())
    assert (
        run(
            "--data", "shapes", "--num", "6", "--out", "eval", "--guidance", "base=1,2", "--aug-level", "0,0.1,0.2",
            "--save-best", "FD-random",
        )
        == 0
    )  # fmt: skip
    found = schema.load("eval")
    assert found.kind == "sweep"
    assert [row.settings["guidance"][0] for row in found.rows] == [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]
    assert [row.settings["aug_level"][1] for row in found.rows] == [0.0, 0.1, 0.2] * 2
    folders = [path.name for path in (cascade / "eval" / "samples").iterdir() if path.is_dir()]
    assert sum(name.startswith("base-text") for name in folders) == 2
    assert sum(name.startswith("sr_16-chain") for name in folders) == 6
    distances = [next(v["value"] for v in row.values if v["metric"] == "FD-random") for row in found.rows]
    best = found.rows[distances.index(min(distances))]
    manifest = json.loads((cascade / "cascade" / "cascade.json").read_text())
    assert [entry["sampling"]["guidance"] for entry in manifest["stages"]] == best.settings["guidance"]
    assert manifest["stages"][1]["aug_level"] == best.settings["aug_level"][1]
    assert manifest["metrics"][-1]["chosen_by"] == "FD-random"
    assert manifest["metrics"][-1]["value"]["value"] == min(distances)
    assert [entry["weights"] for entry in manifest["stages"]] == [entry["weights"] for entry in before["stages"]]
    assert Cascade.load("cascade").settings()[0].guidance == best.settings["guidance"][0]
    assert "saved to cascade" in capsys.readouterr().out


def test_evidence_is_written_once(cascade):
    arguments = (
        "--data",
        "shapes",
        "--num",
        "4",
        "--out",
        "eval",
        "--guidance",
        "base=1,2",
        "--save-best",
        "FD-random",
    )
    assert run(*arguments) == 0
    once = (cascade / "cascade" / "cascade.json").read_text()
    assert run(*arguments) == 0
    assert (cascade / "cascade" / "cascade.json").read_text() == once


def test_a_cascade_that_cannot_be_written_is_refused_before_the_work(cascade, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever tests may be root, who may write everywhere
    assert run("--data", "shapes", "--num", "4", "--out", "eval", "--save-best", "FD-random") == 2
    assert "'cascade', which cannot be written" in capsys.readouterr().err
    assert not (cascade / "eval").exists()


def test_stages_without_text_in_bf16(cascade):
    plain = {name: value for name, value in SMALL.items() if name != "text_dim"}
    base = BaseStage(
        8, UNet(**plain, text_dim=None, attention=[False, False]), sampling=Sampling(num_steps=2, guidance=1.0)
    )
    Cascade([base]).save("plain")
    arguments = ["--data", "shapes", "--num", "4", "--out", "eval", "--precision", "bf16"]
    assert main(["evaluate", "plain", *arguments]) == 0
    row = schema.load("eval").rows[0]
    assert (row.stage, row.input) == ("base", None)
    assert {value["protocol"]["precision"] for value in row.values} == {"bf16"}


def test_super_resolution_alone(cascade, capsys):
    Cascade([Cascade.load("cascade").stages[1]]).save("alone")
    assert main(["evaluate", "alone", "--data", "shapes", "--num", "4", "--out", "eval"]) == 0
    found = schema.load("eval")
    assert [(row.stage, row.input) for row in found.rows] == [("sr_16", "real"), ("real images, 16 px", None)]
    assert "PSNR" in {value["metric"] for value in found.rows[0].values}
    (cascade / "prompts.txt").write_text("a dog\n")
    capsys.readouterr()
    assert main(["evaluate", "alone", "--prompts", "prompts.txt", "--out", "other"]) == 2
    assert "needs images; give --data" in capsys.readouterr().err


def test_captions_and_pictures_of_real_images_are_kept(cascade):
    assert run("--data", "shapes", "--num", "4", "--out", "eval") == 0
    captions = json.loads((cascade / "eval" / "samples" / "captions.json").read_text())
    assert len(captions) == 4
    for row in schema.load("eval").rows:
        assert (cascade / "eval" / row.samples).is_file()


def test_an_evaluation_goes_on_and_refuses_another_one_s_folder(cascade, capsys):
    arguments = ("--data", "shapes", "--num", "4", "--out", "eval")
    assert run(*arguments) == 0
    first = schema.load("eval")
    (cascade / "eval" / "evaluation.json").unlink()
    lost = next(path.parent for path in (cascade / "eval" / "samples").glob("sr_16-real-*/00001.png"))
    (lost / "00001.png").unlink()
    for path in (cascade / "eval" / "measured").iterdir():
        path.unlink()
    assert run(*arguments) == 0
    assert [row.values for row in schema.load("eval").rows] == [row.values for row in first.rows]
    capsys.readouterr()
    assert run(*arguments[:-1], "eval", "--seed", "1") == 2
    assert "its seed is 0, this one's 1" in capsys.readouterr().err


def test_prompts_by_category(cascade, capsys):
    (cascade / "drawbench.csv").write_text(
        "Prompts,Category\na small red star on a white background,Stars\n"
        "a large blue circle on a black background,Circles\n"
        "a large red circle on a black background,Circles\n"
    )
    assert run("--prompts", "drawbench.csv", "--out", "eval") == 0
    rows = schema.load("eval").rows
    assert [row.settings.get("category") for row in rows] == [None, "Stars", "Circles"]
    assert [Value.from_json(row.values[-1]).protocol.num_samples for row in rows] == [3, 1, 2]
    assert "Circles" in capsys.readouterr().out


def test_prompts_without_a_metric(cascade, capsys):
    (cascade / "prompts.txt").write_text("a dog\na cat\n")
    assert run("--prompts", "prompts.txt", "--out", "eval") == 0
    assert "give --clip" in capsys.readouterr().out
    assert list((cascade / "eval" / "samples").glob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "one of the arguments --data --prompts is required"),
        (("--data", "shapes", "--num", "1"), "--num: '1' is outside"),
        (("--data", "shapes", "--batch-size", "0"), "--batch-size: '0' is outside"),
        (("--data", "nowhere.tar"), "match no file"),
        (("--data", "shapes", "--guidance", "sr_64=1"), "'sr_64' is unknown"),
        (("--data", "shapes", "--guidance", "1,x"), "'x' is not a number"),
        (("--data", "shapes", "--steps", "1", "--steps", "2"), "given twice"),
        (("--data", "shapes", "--aug-level", "base=0.1"), "takes no low-resolution image"),
        (("--data", "shapes", "--save-best", "beauty"), "'beauty' cannot choose"),
        (("--data", "shapes", "--inception", "nowhere.pth", "--num", "2"), "nowhere.pth"),
        (("--data", "shapes", "--features", "nowhere.yaml"), "nowhere.yaml"),
    ],
)
def test_refusals_leave_nothing(cascade, capsys, arguments, words):
    assert run("--out", "eval", *arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert not (cascade / "eval").exists()


@pytest.mark.parametrize(
    ("metric", "words"), [("FD-random", "give --clip"), ("CLIP score", "give --clip"), ("caption accuracy", "--clip")]
)
def test_what_cannot_be_measured_chooses_no_point(cascade, capsys, metric, words):
    (cascade / "prompts.txt").write_text("a dog\na cat\n")
    assert run("--prompts", "prompts.txt", "--out", "eval", "--guidance", "base=1,2", "--save-best", metric) == 2
    assert words in capsys.readouterr().err
    assert not (cascade / "eval").exists()


def test_a_full_disk_leaves_what_can_go_on(cascade):
    arguments = [
        "-m",
        "imagen_lightning",
        "evaluate",
        "cascade",
        "--data",
        "shapes",
        "--num",
        "300",
        "--out",
        "eval",
        "--batch-size",
        "300",
    ]
    # 4 blocks of 1024 bytes hold any image of 16 px, and not the captions
    limited = ["bash", "-c", 'ulimit -f 4; exec "$@"', "bash", sys.executable, *arguments]
    first = subprocess.run(limited, capture_output=True, text=True, timeout=120)
    assert first.returncode == 2
    assert "captions.json cannot be written: File too large" in first.stderr
    assert not list((cascade / "eval").rglob("*.partial"))
    assert main(arguments[2:]) == 0


def test_a_folder_that_holds_something_else_is_refused(cascade, capsys):
    (cascade / "eval").mkdir()
    (cascade / "eval" / "thesis.txt").write_text("mine")
    assert run("--data", "shapes", "--num", "4", "--out", "eval") == 2
    assert "holds no evaluation" in capsys.readouterr().err
    assert [path.name for path in (cascade / "eval").iterdir()] == ["thesis.txt"]


def start_two(command):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]


def drawn(folder, least):
    """Waits for that many images."""
    for _ in range(1200):
        if len(list(folder.glob("samples/*-*/*.png"))) >= least:
            return
        time.sleep(0.05)
    raise TimeoutError(folder)


@pytest.mark.slow
def test_a_process_that_waits_for_a_dead_one_ends(cascade):
    arguments = [
        "evaluate",
        "cascade",
        "--data",
        "shapes",
        "--num",
        "64",
        "--batch-size",
        "2",
        "--steps",
        "20",
        "--out",
        "eval",
    ]
    waiting, dead = start_two([sys.executable, "-m", "imagen_lightning", *arguments])
    drawn(cascade / "eval", 4)
    dead.kill()
    error = waiting.communicate(timeout=60)[1]
    dead.communicate()
    assert waiting.returncode == 2
    assert "another process has ended" in error
    assert main(arguments) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_process_that_was_stopped_goes_on(cascade, number, code):
    arguments = ["evaluate", "cascade", "--data", "shapes", "--num", "64", "--batch-size", "2", "--steps", "20"]
    with subprocess.Popen(
        [sys.executable, "-m", "imagen_lightning", *arguments, "--out", "eval"], stderr=subprocess.PIPE, text=True
    ) as process:
        drawn(cascade / "eval", 10)
        process.send_signal(number)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert number == signal.SIGKILL or "Stopped; the same command goes on" in error
    for out in ("eval", "whole"):
        assert main([*arguments, "--out", out]) == 0
    one, other = schema.load("eval"), schema.load("whole")
    for row, same in zip(one.rows, other.rows, strict=True):
        assert [value["protocol"] for value in row.values] == [value["protocol"] for value in same.values]
        numbers = [[value["value"] for value in item.values] for item in (row, same)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-9)


def test_two_processes_share_the_drawing(cascade):
    command = [sys.executable, "-m", "imagen_lightning", "evaluate", "cascade", "--data", "shapes", "--num", "5"]
    command += ["--batch-size", "2"]
    processes = start_two([*command, "--out", "shared"])
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert main([*command[3:], "--out", "alone"]) == 0
    one, other = schema.load("shared"), schema.load("alone")
    for row, same in zip(one.rows, other.rows, strict=True):  # threads may round otherwise
        for value, expected in zip(row.values, same.values, strict=True):
            assert value["protocol"] == expected["protocol"]
            assert value["value"] == pytest.approx(expected["value"], rel=1e-4, abs=1e-9)
    assert one.environment["processes"] == 2
    parts = {path.name for path in (cascade / "shared" / "samples").glob("*/cost-*.json")}
    assert parts == {"cost-00000.json", "cost-00002.json", "cost-00004.json"}
