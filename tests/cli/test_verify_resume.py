"""What verify-resume takes for equal, what it does not, and the whole of it on a tiny stage."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from kill_harness import config, write_shards

from imagen_lightning.callbacks.history import StepSamples, read_history
from imagen_lightning.cli.main import main
from imagen_lightning.cli.verify_resume import (
    HISTORY,
    compare_histories,
    compare_runs,
    largest_difference,
    num_steps,
    table,
)
from imagen_lightning.types import InputError


def test_the_largest_difference():
    first = {"a": torch.tensor([1.0, 2.0]), "b": [{"c": 1, "d": "x"}, (torch.tensor(3, dtype=torch.int64), None)]}
    assert largest_difference(first, first) == 0
    other = {"a": torch.tensor([1.0, 2.25]), "b": [{"c": 1, "d": "x"}, (torch.tensor(7, dtype=torch.int64), None)]}
    assert largest_difference(first, other) == 4
    assert largest_difference(1.0, 1.5) == 0.5
    for odd in (
        {"a": first["a"]},
        {**first, "a": torch.tensor([1.0])},
        {**first, "a": torch.tensor([1.0, float("nan")])},
        {**first, "b": [{"c": 2, "d": "x"}, first["b"][1]]},
    ):
        assert largest_difference(first, odd) == float("inf")
    nan = torch.tensor(float("nan"))
    assert largest_difference(nan, nan) == float("inf")


def steps(*positions):
    return [StepSamples(list(p), [f"k{n}" for n in p], [0.5] * len(p)) for p in positions]


def test_a_sample_lost_or_repeated_is_seen_in_the_history():
    whole = steps((0, 1), (2, 3), (4, 5))
    assert [item.largest for item in compare_histories(whole, whole)] == [0, 0]
    for other in (
        steps((0, 1), (2, 3), (5, 6)),
        steps((0, 1), (1, 2), (3, 4)),
        steps((0, 1), (3, 2), (4, 5)),
        whole[:2],
    ):
        assert compare_histories(whole, other)[0].largest == float("inf")
        assert compare_histories(other, other)[0].largest == (0 if other == whole[:2] else float("inf"))
    renamed = steps((0, 1), (2, 3), (4, 5))
    renamed[1].keys[0] = "other"
    assert compare_histories(whole, renamed)[0].largest == float("inf")
    dearer = steps((0, 1), (2, 3), (4, 5))
    dearer[2].losses[1] = 0.75
    assert [item.largest for item in compare_histories(whole, dearer)] == [0, 0.25]


def test_a_history_follows_the_restarts(tmp_path):
    path = tmp_path / HISTORY

    def line(step, position):
        return json.dumps({"step": step, "positions": [position], "keys": ["k"], "losses": [0.0]})

    begun = json.dumps({"begins_after": 0})
    parts = [
        "",
        begun,
        line(1, 0),
        line(2, 1),
        line(3, 9),
        line(4, 3)[:20],
        "",
        json.dumps({"begins_after": 2}),
        line(3, 2),
    ]
    path.write_text("\n".join(parts) + "\n")
    assert [step.positions for step in read_history(path)] == [[0], [1], [2]]
    assert num_steps(tmp_path) == 3
    path.write_text("\n".join([begun, line(1, 0), line(3, 2)]) + "\n")
    with pytest.raises(InputError, match="step 2 is missing"):
        read_history(path)
    path.write_text("\n".join([begun, line(1, 0), json.dumps({"begins_after": 2})]) + "\n")
    with pytest.raises(InputError, match="begins after step 2 of 1"):
        read_history(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(sys, "argv", ["imagen-lightning"])
    write_shards(tmp_path / "shards")
    settings = config("shards", tmp_path / "shards")
    settings["model"]["init_args"]["optimization"]["warmup_steps"] = 50
    Path("stage.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def test_two_runs_that_differ_are_told_apart(folder, capsys):
    def run(name, *more):
        history = ["--trainer.callbacks+=imagen_lightning.callbacks.history.SampleHistory"]
        history += ["--trainer.callbacks.path", f"{name}/{HISTORY}"]
        options = ["--model.init_args.optimization.warmup_steps", "1", "--trainer.max_steps", "4", *more]
        assert main(["fit", "--config", "stage.yaml", "--run", name, *options, *history]) == 0
        return Path(name)

    first, again = run("first"), run("again")
    assert all(item.largest == 0 for item in compare_runs(first, again))
    found = {item.what: item.largest for item in compare_runs(first, run("other", "--seed_everything", "2"))}
    assert found["samples seen, in order"] == found["position in the data"] == found["learning rate schedule"] == 0
    assert 0 < found["weights"] < 1
    assert 0 < found["metrics.csv"] < 1
    assert found["optimizer"] > 0
    shifted = compare_runs(first, run("shifted", "--data.init_args.seed", "2"))
    assert {item.what: item.largest for item in shifted}["samples seen, in order"] == float("inf")
    lines = table(shifted).splitlines()
    assert lines[0].split() == ["what", "equal", "largest", "difference"]
    assert any(line.startswith("samples seen, in order") and "NO" in line for line in lines)


@pytest.mark.slow
def test_the_whole_of_it(folder, capsys):
    options = ["--config", "stage.yaml", "--kills", "2", "--steps", "12", "--workers", "0,2"]
    assert main(["verify-resume", *options, "--out", "out"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("kill ") >= 2
    assert "resume is exact: 2 kills" in shown
    assert "NO" not in shown
    assert len(read_history(f"out/killed/{HISTORY}")) == 12
    shutil.rmtree("out")
    options += ["--processes", "1,2", "--model.init_args.network.init_args.dropout", "0"]
    assert main(["verify-resume", *options]) == 0
    assert "samples seen, in order" in capsys.readouterr().out


def test_what_cannot_be_verified_is_one_line(folder, capsys):
    Path("full").mkdir()
    Path("full/file").touch()
    for more, words in (
        (["--run", "here"], "makes runs of its own; drop --run"),
        (["--kills", "0"], "argument --kills: '0' is outside [1, 1000]"),
        (["--workers", "two"], "'two' is not a whole number"),
        (["--out", "full"], "full is not empty"),
    ):
        assert main(["verify-resume", "--config", "stage.yaml", *more]) == 2
        assert words in capsys.readouterr().err
