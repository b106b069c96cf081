"""`evaluate`: the matrix, sweeps, the saved operating point, prompts, processes, going on, and refusals of one line."""

import json
import os
import socket
import subprocess
import sys

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
        assert (protocol.num_samples, protocol.seed, protocol.weights) == (6, 0, "ema")
        assert distance.low <= distance.value <= distance.high
        assert row.seconds_per_image > 0
    assert found.environment["command"].startswith("imagen-lightning evaluate cascade --data shapes")
    assert {path.name for path in (cascade / "eval").iterdir()} == {
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
        (("--data", "shapes", "--num", "1"), "--num 1"),
        (("--data", "shapes", "--batch-size", "0"), "--batch-size 0"),
        (("--data", "nowhere.tar"), "match no file"),
        (("--data", "shapes", "--guidance", "sr_64=1"), "'sr_64' is unknown"),
        (("--data", "shapes", "--guidance", "1,x"), "give float values"),
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


def test_a_folder_that_holds_something_else_is_refused(cascade, capsys):
    (cascade / "eval").mkdir()
    (cascade / "eval" / "thesis.txt").write_text("mine")
    assert run("--data", "shapes", "--num", "4", "--out", "eval") == 2
    assert "holds no evaluation" in capsys.readouterr().err
    assert [path.name for path in (cascade / "eval").iterdir()] == ["thesis.txt"]


def test_two_processes_share_the_drawing(cascade):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "imagen_lightning", "evaluate", "cascade", "--data", "shapes", "--num", "5"]
    command += ["--batch-size", "2"]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*command, "--out", "shared"],
            env={**os.environ, **shared, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
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
