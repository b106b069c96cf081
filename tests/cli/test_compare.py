"""`compare`: images of both cascades once, a page that takes votes, the result, and refusals."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from urllib.request import Request, urlopen

import pytest

from imagen_lightning.cascade import Cascade
from imagen_lightning.cli.main import main
from imagen_lightning.networks import UNet
from imagen_lightning.stages import BaseStage, Sampling, TextSettings
from imagen_lightning.text import TinyTextEncoder


@pytest.fixture
def cascades(tmp_path, monkeypatch):
    """Cascades "one" and "two" of random weights and a prompt set, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for name, dim in (("one", 8), ("two", 16)):
        network = UNet(dim=dim, multipliers=[1], num_blocks=1, attention=[False], text_dim=16, head_dim=8, groups=4)
        text = TextSettings(TinyTextEncoder(dim=16, max_tokens=32))
        Cascade([BaseStage(8, network, text=text, sampling=Sampling(num_steps=1, guidance=1.0))]).save(name)
    (tmp_path / "prompts.csv").write_text("Prompts,Category\nred,Colors\nblue,Colors\nthree,Counting\n")
    return tmp_path


COMMAND = ["compare", "one", "two", "--prompts", "prompts.csv", "--out", "vote", "--num-images", "2"]


def test_from_images_to_the_result(cascades):
    command = [sys.executable, "-m", "imagen_lightning", *COMMAND]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's children ignore it
    ) as run:
        line = next(line for line in run.stdout if "http://" in line)
        url = re.search(r"http://\S+/", line)[0]
        with urlopen(url + "ballot") as answer:
            ballot = json.load(answer)
        assert sorted(ballot["order"]) == [0, 1, 2]
        for prompt in ballot["order"]:
            body = json.dumps({"prompt": prompt, "question": "fidelity", "side": "left"}).encode()
            urlopen(Request(url + "vote", data=body, headers={"Content-Type": "application/json"})).close()
        run.send_signal(signal.SIGINT)
        out = run.stdout.read()
    assert run.returncode == 0
    assert "A is one, B is two; 3 votes" in out
    result = json.loads((cascades / "vote" / "result.json").read_text())
    (overall,) = result["preferences"]
    assert overall["a"] + overall["b"] == 3
    assert list(result["categories"]) == ["Colors", "Counting"]
    for name in ("a", "b"):
        assert len(list((cascades / "vote" / name).glob("*.png"))) == 6
    assert main([*COMMAND, "--result"]) == 0


def test_a_cascade_that_was_trained_on_is_another(cascades, capsys, monkeypatch):
    def ctrl_c(self, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr("imagen_lightning.evaluation.compare.BallotServer.serve_forever", ctrl_c)
    assert main(COMMAND) == 0
    assert main(COMMAND) == 0
    shutil.rmtree("one")
    Cascade.load("two").save("one")
    capsys.readouterr()
    assert main(COMMAND) == 2
    assert "its a_sha256 is" in capsys.readouterr().err
    shutil.rmtree("one")
    assert main([*COMMAND, "--result"]) == 0  # votes are read without the cascades


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num", "0"], "argument --num: '0' is outside"),
        (["--result"], "holds no comparison yet"),
        (["--prompts", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_refusals(cascades, capsys, arguments, words):
    assert main([*COMMAND, *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (cascades / "vote").exists()


def test_another_comparison_s_folder(cascades, capsys):
    (cascades / "vote").mkdir()
    (cascades / "vote" / "plan.json").write_text(json.dumps({"a": "three"}))
    assert main(COMMAND) == 2
    assert "its a is 'three', this one's 'one'" in capsys.readouterr().err
