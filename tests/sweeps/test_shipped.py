"""Shipped sweep files and overlays: W&B's schema, values that arrive where names point, combinations, refusals."""

import os
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from imagen_lightning.cli.main import main
from imagen_lightning.cli.sweep_check import check, configuration, examples, logged_names
from imagen_lightning.errors import InputError
from imagen_lightning.sweeps.command import arguments_of, expand, own_command
from imagen_lightning.sweeps.file import read_sweep
from imagen_lightning.sweeps.metric import history, known_metrics

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SWEEPS = sorted((EXPERIMENTS / "sweeps").glob("*.yaml"))
TRAININGS = [path for path in SWEEPS if "fit" in yaml.safe_load(path.read_text())["command"]]
OVERLAYS = sorted((EXPERIMENTS / "overlays").glob("*.yaml"))
STAGES = sorted(path for path in EXPERIMENTS.rglob("*.yaml") if path.parent.name not in ("sweeps", "overlays"))


def identity(path):
    return path.stem


def at(config, name):
    """What lies at a dotted name; a class without arguments for its class_path."""
    place = config
    for key in name.split("."):
        place = place[key] if key in place or "init_args" not in place else place["init_args"][key]
    return place


def contains(whole, part):
    """Whether a configuration holds a file's values; `name+` adds to a list."""
    if isinstance(part, dict):
        added = {key: value for key, value in part.items() if key.endswith("+")}
        return all(
            key in whole and contains(whole[key], value) for key, value in part.items() if key not in added
        ) and all(contains(whole[key[:-1]][-len(value) :], value) for key, value in added.items())
    if isinstance(part, list):
        return len(whole) == len(part) and all(map(contains, whole, part))
    return whole == part


def test_the_four_are_there():
    names = {"quickstart_parametrization", "sampling_pareto", "stage_base", "sr_augmentation"}
    assert {path.stem for path in SWEEPS} >= names
    assert {"v_prediction", "shifted_schedule", "min_snr"} <= {path.stem for path in OVERLAYS}


@pytest.mark.parametrize("path", SWEEPS, ids=identity)
def test_values_arrive_where_the_names_point(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the stages are found in the package
    sweep = read_sweep(path)
    for values in examples(sweep):
        words = expand(sweep, arguments_of(sweep, values))
        verb, rest = own_command(words)
        if verb == "evaluate":
            from imagen_lightning.cli.evaluate import axes_of, parser

            axes = axes_of(parser().parse_args(rest))
            for name, value in values.items():
                stage, _, number = str(value).rpartition("=")
                assert [str(item) for item in axes[name.replace("-", "_")][stage]] in ([number], [f"{number}.0"])
            continue
        assert verb == "fit"
        config = configuration(rest)
        for name, value in values.items():
            targets = ("seed_everything", "model.init_args.seed", "data.init_args.seed") if name == "seed" else (name,)
            for target in targets:
                found = at(config, target)
                assert found == value or found["class_path"] == value, (name, found)
        assert config["run"] == f"runs/{sweep.name}"


@pytest.mark.parametrize("path", SWEEPS, ids=identity)
def test_a_head_says_what_it_takes_and_gives(path):
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    said = dict(re.findall(r"^# (\w+): +(\S.*)$", head, re.MULTILINE))
    assert {"command", "hardware", "duration", "result"} <= said.keys()
    assert f"sweep experiments/sweeps/{path.name}" in head
    assert f"wandb sweep experiments/sweeps/{path.name}" in head
    for key in ("duration", "result"):
        assert re.search(r"\d|not yet measured", said[key])


@pytest.mark.parametrize("path", SWEEPS, ids=identity)
def test_the_schema_of_wandb(path):
    """W&B's own check is in its package `sweeps` (wandb[sweeps]); wandb alone leaves it to the server."""
    config = pytest.importorskip("sweeps.config", reason="W&B's package of sweeps (wandb[sweeps]) is not installed")
    assert config.schema_violations_from_proposed_config(yaml.safe_load(path.read_text())) == []


def test_the_schema_of_wandb_takes_every_distribution(tmp_path):
    config = pytest.importorskip("sweeps.config", reason="W&B's package of sweeps (wandb[sweeps]) is not installed")
    from tests.sweeps.test_search import PARAMETERS  # type: ignore[import-not-found]

    content = {"program": "p", "method": "random", "metric": {"name": "loss"}, "parameters": PARAMETERS}
    assert config.schema_violations_from_proposed_config(content) == []


def misspelt(tmp_path, **parameters):
    command = ["imagen-lightning", "fit", "--config", "experiments/quickstart/base.yaml", "${args}"]
    content = {"method": "grid", "metric": {"name": "val/loss"}, "command": command, "parameters": parameters}
    path = tmp_path / "misspelt.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"model.init_args.optimization.optimizer.init_args.lrr": {"values": [1, 2]}}, "did you mean lr?"),
        ({"trainer.max_step": {"value": 3}}, "max_steps"),
        ({"ema": {"parameters": {"decy": {"value": 0.5}}}}, "decy"),
        (
            {
                "model.init_args.diffusion.parametrization": {
                    "values": ["imagen_lightning.diffusion.V", "imagen_lightning.diffusion.W"]
                }
            },
            "'imagen_lightning.diffusion.W' does not exist",
        ),
    ],
)
def test_what_is_misspelt_is_refused_before_the_first_trial(tmp_path, parameters, words):
    with pytest.raises(InputError) as error:
        check(read_sweep(misspelt(tmp_path, **parameters)))
    assert "misspelt.yaml: " in str(error.value)
    assert words in str(error.value)


def test_what_evaluate_does_not_take_is_refused(tmp_path, capsys):
    command = ["imagen-lightning", "evaluate", "c", "--data=shapes", "${args}"]
    content = {"method": "grid", "command": command}
    content["metric"] = {"name": "caption accuracy", "goal": "maximize"}
    for name, words in (("guidnce", "guidnce"), ("steps", "'many'")):
        path = tmp_path / "misspelt.yaml"
        path.write_text(yaml.safe_dump(content | {"parameters": {name: {"values": ["many"]}}}))
        assert main(["sweep", str(path), "--dry-run"]) == 2
        assert words in capsys.readouterr().err


# ---- overlays


@pytest.mark.parametrize("overlay", OVERLAYS, ids=identity)
def test_an_overlay_changes_what_it_says_of_every_stage(overlay):
    given = yaml.safe_load(overlay.read_text())
    head = overlay.read_text()
    combines = re.search(r"^# combines: (any stage|base stages|super-resolution stages)", head, re.MULTILINE)[1]
    kinds = {"base stages": "BaseStage", "super-resolution stages": "SuperResolutionStage"}
    for stage in STAGES:
        if kinds.get(combines, "Stage") not in stage.read_text():
            continue
        config = configuration(["--config", str(stage), "--config", str(overlay)])
        assert contains(config, given), stage
    assert f"--config experiments/overlays/{overlay.name} " in head


def test_measured_samples_leave_the_stages_own_callbacks():
    """A list in an overlay replaces the stage's, and one of the same length inherits arguments place by place."""
    stage = EXPERIMENTS / "quickstart" / "base.yaml"
    own = yaml.safe_load(stage.read_text())["trainer"]["callbacks"]
    overlay = EXPERIMENTS / "overlays" / "measured_samples.yaml"
    callbacks = configuration(["--config", str(stage), "--config", str(overlay)])["trainer"]["callbacks"]
    assert [callback["class_path"] for callback in callbacks[:-1]] == [callback["class_path"] for callback in own]
    assert callbacks[-1]["class_path"] == "imagen_lightning.callbacks.FID"
    assert not callbacks[-1]["init_args"]["prompts"]


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path.stem == "stage_base" else pytest.mark.slow) for path in TRAININGS],
    ids=identity,
)
def test_the_first_trial_trains_and_logs_its_metric(path, tmp_path):
    sweep = read_sweep(path)
    verb, rest = own_command(expand(sweep, arguments_of(sweep, next(iter(examples(sweep))))))
    small = [
        "--trainer.max_steps=2",
        "--model.init_args.optimization.warmup_steps=0",
        "--trainer.limit_val_batches=1",
        "--trainer.enable_progress_bar=false",
    ]
    run = tmp_path / "run"
    program = [sys.executable, "-m", "imagen_lightning", verb, *rest, f"--run={run}", *small]
    environment = {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, capture_output=True, text=True, cwd=EXPERIMENTS.parent, env=environment)
    assert done.returncode == 0, done.stderr
    assert [step for step, _ in history(run, sweep.metric.name)] == [2]
    assert set(known_metrics(run)) <= logged_names(configuration([*rest, f"--run={run}"]))


def test_overlays_combine():
    stage = EXPERIMENTS / "quickstart" / "base.yaml"
    for one, other in combinations(OVERLAYS, 2):
        first, second = (yaml.safe_load(path.read_text()) for path in (one, other))
        config = configuration(["--config", str(stage), "--config", str(one), "--config", str(other)])
        assert contains(config, second), (one, other)
        alike = set(first.get("model", {}).get("init_args", {}).get("diffusion", ())) & set(
            second.get("model", {}).get("init_args", {}).get("diffusion", ())
        )
        assert alike or contains(config, first), (one, other)  # where both change a thing, the later one counts


def test_nothing_of_the_command_line_is_left_behind():
    before = list(sys.argv)
    configuration(["--config", str(EXPERIMENTS / "quickstart" / "base.yaml")])
    assert sys.argv == before
