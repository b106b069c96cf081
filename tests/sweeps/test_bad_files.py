"""Every wrong value in a sweep file ends in one line, before anything is made: each part of shipped files is spoilt."""

import copy
import io
import json
import random
import subprocess
from pathlib import Path

import pytest
import yaml

from imagen_lightning.catalog import higher_is_better
from imagen_lightning.cli import sweep_check
from imagen_lightning.cli.main import main
from imagen_lightning.cli.sweep import MAX_TRIALS
from imagen_lightning.errors import InputError
from imagen_lightning.sweeps.file import read_sweep
from imagen_lightning.sweeps.folder import SweepFolder
from imagen_lightning.sweeps.runner import preview, trial_command
from imagen_lightning.sweeps.search import grid_size, search_of

SHIPPED = sorted((Path(__file__).parents[2] / "experiments" / "sweeps").glob("*.yaml"))
DEEP = "x"
for _ in range(40):
    DEEP = [DEEP]
BAD = [
    *(None, True, False, 0, -1, 1, 10**12, 10**30, 10**400, 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf")),
    *(
        "",
        " ",
        "nul\0",
        "a\nb",
        "\U0001f600",
        "x" * 5000,
        "../up",
        "/",
        "..",
        "[1",
        "${argz}",
        "1e-4",
        "hyperband",
        "grid",
    ),
    *([], [[]], [None], ["${args}"], [1, 1.0], [True, 1], list(range(2000)), DEEP, {}, {"": 1}, {None: 1}, {1: 2}),
    *({"value": None}, {"values": []}, {"values": [{}, {}]}, {"min": 2, "max": 1}, {"min": 0, "max": 10**15}),
    *({"min": 0.0, "max": float("inf")}, {"min": -1e308, "max": 1e308}, {"min": "a", "max": []}, {"min": 1}),
    *({"distribution": d, "min": 0, "max": 1, "q": q} for d in ("q_uniform",) for q in (0, -1, 1e-300, "a", 10**400)),
    *({"distribution": "normal", "mu": 0, "sigma": s} for s in (0, 1e308, None)),
    *({"distribution": d, "min": 0, "max": 1} for d in ("log_uniform_values", ["uniform"], {}, 3, "beta")),
    *({"parameters": p} for p in ({}, None, [], {"a": {"parameters": {"b": {"value": 1}}}})),
    *({"type": "hyperband", key: value} for key in ("min_iter", "s") for value in (0, 10**30, "1")),
    *({"type": "hyperband", "max_iter": 9, "s": s, "eta": eta} for s in (1, 10**9) for eta in (3, 10**400, 1 + 1e-9)),
    *({"name": ""}, {"name": "val/loss", "goal": ["minimize"]}),
]


def places(content, path=()):
    """The path of every part."""
    yield path
    if isinstance(content, dict):
        for key, value in content.items():
            yield from places(value, (*path, key))
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from places(value, (*path, number))


def changed(content, path, value):
    if not path:
        return value
    made = copy.deepcopy(content)
    place = made
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return made


def spoilt(path):
    """The file with each part replaced by each bad value, left out, or given another key."""
    content = yaml.safe_load(path.read_text())
    content["early_terminate"] = {"type": "hyperband", "max_iter": 27, "s": 2, "eta": 3, "strict": True}
    content["parameters"]["more"] = {"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.5}
    for place in places(content):
        for value in BAD:
            yield changed(content, place, value)
        if place and isinstance(place[-1], str):
            less = copy.deepcopy(content)
            inner = less
            for key in place[:-1]:
                inner = inner[key]
            value = inner.pop(place[-1])
            yield less
            inner[place[-1] + "x"] = value
            yield copy.deepcopy(less)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_spoilt_file_is_refused_in_one_line_or_sound(path, tmp_path):
    """Of all spoilt files a random part, another one for each shipped file."""
    every = list(spoilt(path))
    wrong = random.Random(path.stem).sample(every, 150)
    refused, place = [], SweepFolder(tmp_path, "", "")
    for number, content in enumerate(wrong):
        file = tmp_path / "spoilt.yaml"
        file.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        try:
            sweep = read_sweep(file)
            json.dumps(search_of(sweep), allow_nan=False)  # what the study keeps
            commands = [trial_command(sweep, params, place, number) for params in previewed(sweep)]
        except InputError as error:
            refused.append(str(error))
            continue
        assert all(isinstance(word, str) and "\0" not in word for words in commands for word in words)
        assert sweep.method != "grid" or grid_size(sweep) >= 1
    assert len(refused) > len(wrong) / 2
    assert [line for line in refused if len(line) > 1000 or "\n" in line] == []


def previewed(sweep):
    return preview(sweep, "tpe", 0, min(3, grid_size(sweep)) if sweep.method == "grid" else 3)


# ---- whole commands, that nothing is made


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs a sweep in this process; its one line."""
    monkeypatch.chdir(tmp_path)

    def refused(text, *options):
        Path("sweep.yaml").write_text(text, encoding="utf-8")
        assert main(["sweep", "sweep.yaml", *options]) == 2
        assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]
        error = capsys.readouterr().err
        assert error.startswith("imagen-lightning: error: ")
        assert error.count("\n") == 1
        return error

    return refused


def sweep_text(**content):
    base = {"program": "python", "command": ["${program}", "${args}"], "method": "grid", "metric": {"name": "loss"}}
    return yaml.safe_dump({**base, "parameters": {"x": {"values": [1, 2]}}, **content})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"run_cap": 10**12, "method": "random"}, "1,000,000,000,000 trials"),
        ({"parameters": {name: {"min": 0, "max": 999} for name in "abc"}}, "1,000,000,000 trials; give --trials"),
        ({"parameters": {"a": {"min": 0, "max": 2**53}}}, "trials; give --trials"),
        ({"name": "../elsewhere"}, "is not a folder's"),
        ({"name": "a/b"}, "is not a folder's"),
        ({"name": ".."}, "is not a folder's"),
        ({"program": "there_is_none"}, "there is no program 'there_is_none'"),
        ({"parameters": {"x": {"value": None}}}, "the text None"),
    ],
)
def test_what_is_refused_makes_nothing(refused, content, words):
    assert words in refused(sweep_text(**content))


@pytest.mark.parametrize(
    "options",
    [
        *(["--trials", text] for text in ("0", "-1", "1.5", "nan", str(MAX_TRIALS + 1), "9" * 5000)),
        *(["--workers", text] for text in ("0", "1000000000", "")),
        *(["--seed", text] for text in ("-1", str(2**32), "x")),
        *(["--sampler", text] for text in ("", "random")),
        *(["--study", text] for text in ("nosuch://x/y", "", "sqlite:////nowhere/at/all.db")),
        *(["--out", text] for text in ("/proc/nothing", "sweep.yaml", "sweep.yaml/in")),
        *(["--tirals", "3"], ["more"]),
    ],
)
def test_options_that_are_refused_make_nothing(refused, options):
    refused(sweep_text(), *options)


def test_a_huge_grid_is_never_listed(tmp_path, capsys):
    file = tmp_path / "sweep.yaml"
    file.write_text(sweep_text(parameters={name: {"min": 0, "max": 2**50} for name in "abc"}))
    assert main(["sweep", str(file), "--dry-run", "--trials", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"python --a=0 --b=0 --c={number}" for number in range(2)]


# ---- the metric's name

QUICKSTART = ["imagen-lightning", "fit", "--config", "quickstart/base.yaml", "${args}"]
MEASURED = ["--config", "overlays/measured_samples.yaml"]
EVALUATE = ["imagen-lightning", "evaluate", "cascade", "--data=shapes", "${args}"]


@pytest.mark.parametrize(
    ("command", "metric", "words"),
    [
        (QUICKSTART, "val/los", "did you mean val/loss"),
        (QUICKSTART, "base/fd-random", "no trial would log the metric 'base/fd-random'"),
        ([*QUICKSTART, *MEASURED], "base/fd_random", "did you mean base/fd-random"),
        ([*QUICKSTART, *MEASURED], "sr_64/fd-random", "did you mean base/fd-random"),
        ([*QUICKSTART, "--trainer.logger=false"], "val/loss", "trainer.logger false writes no metrics.csv"),
        (EVALUATE, "caption acuracy", "did you mean caption accuracy"),
        (EVALUATE, "FID", "no trial would log the metric 'FID'"),
        (EVALUATE, "CLIP score", "no trial would log the metric 'CLIP score'"),
    ],
)
def test_a_metric_that_no_trial_logs_is_refused_before_the_first(in_process, command, metric, words):
    with pytest.raises(InputError) as error:
        in_process(command, metric)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("command", "metric"),
    [
        (QUICKSTART, "val/loss_t/0.00-0.10"),
        (QUICKSTART, "base/text_gain"),
        ([*QUICKSTART, *MEASURED], "base/fd-random"),
        ([*EVALUATE, "--clip=some/model"], "CLIP-KID"),
        ([*EVALUATE, "--inception=download"], "Inception score"),
        ([*EVALUATE, "--inception=mine.pt"], "FD-mine"),
    ],
)
def test_a_metric_that_trials_log_is_taken(in_process, command, metric):
    assert in_process(command, metric)


@pytest.fixture
def in_process(tmp_path, monkeypatch):
    """Checks a sweep without a second process."""

    def run(words, input, **_):
        source, target = io.StringIO(input), io.StringIO()
        sweep_check.answer(source, target)
        return subprocess.CompletedProcess(words, 0, target.getvalue(), "")

    monkeypatch.setattr(sweep_check.subprocess, "run", run)

    def check(command, metric):
        file = tmp_path / "sweep.yaml"
        parameters = {"seed": {"value": 1}}
        goal = {"goal": "maximize"} if higher_is_better(metric) else {}
        file.write_text(sweep_text(command=command, metric={"name": metric, **goal}, parameters=parameters))
        return sweep_check.check(read_sweep(file))

    return check
