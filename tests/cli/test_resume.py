"""What a resumed run may change, that it is locked, and that a failed start or resume leaves nothing behind."""

import inspect
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import copytree

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

# isort: split
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from tiny_fit import checkpoint, contents, refusal, write
from tiny_stages import base_stage

from imagen_lightning.callbacks import Checkpoint, NoiseLevelLoss
from imagen_lightning.cli import resume_rules
from imagen_lightning.cli.main import main
from imagen_lightning.cli.resume_rules import RULES, Change, Resume, check_changes, describe, differences, rule_of
from imagen_lightning.errors import InputError
from imagen_lightning.stages import Optimization

OPTIMIZATION = resume_rules.OPTIMIZATION
OPTIMIZER = f"{resume_rules.OPTIMIZER}.init_args"
LORA = {"class_path": "imagen_lightning.networks.LoRA", "init_args": {"rank": 2, "alpha": 2.0}}


def flat(config, key=""):
    """Keys of a nested configuration to values."""
    if not isinstance(config, dict):
        return {key: config}
    return {k: v for name, item in config.items() for k, v in flat(item, f"{key}.{name}" if key else name).items()}


def set_at(config, key, value):
    *parents, last = key.split(".")
    for name in parents:
        config = config[name]
    config[last] = value


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with `run`, after two steps."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "disabled")
        patch.setattr(sys, "argv", ["imagen-lightning"])
        write("stage.yaml", **{"trainer/max_steps": 2})
        assert main(["fit", "--config", "stage.yaml", "--run", "run"]) == 0
    return folder / "run"


@pytest.fixture
def run(trained, cli, tmp_path):
    """A copy of that run in the test's folder."""
    copytree(trained, tmp_path / "run")
    return Path("run")


@pytest.fixture(scope="module")
def resolved(trained):
    return yaml.safe_load((trained / "config.yaml").read_text())


@pytest.fixture
def resume(resolved):
    """A resume without changes."""
    loops = {"fit_loop": {"epoch_loop.batch_progress": {"current": {"completed": 6}}}}
    return Resume(Path("run/checkpoints/last.ckpt"), {"loops": loops}, resolved, resolved, make_stage(resolved))


def make_stage(config):
    """A stage with a configuration's optimizer and lr_scales."""
    settings = config["model"]["init_args"]["optimization"]
    optimizer = partial(torch.optim.AdamW, **settings["optimizer"]["init_args"])
    return base_stage(optimization=Optimization(optimizer, lr_scales=settings["lr_scales"]))


# ---- the table


def test_every_key_has_a_rule(resolved):
    keys = {*flat(resolved), *(f"trainer.{name}" for name in inspect.signature(Trainer).parameters)}
    assert [key for key in sorted(keys) if rule_of(key) is RULES[-1]] == []
    assert rule_of("a_new_section.x").outcome == resume_rules.REFUSED


def test_every_rule_counts_for_some_key():
    for rule in RULES[:-1]:
        for pattern in rule.keys:
            assert rule_of(pattern.replace("*", "x").replace("?", "x")) is rule


def test_the_documentation_has_the_table():
    page = Path(__file__).parents[2] / "docs" / "reference" / "resume.md"
    assert resume_rules.table() in page.read_text()


EXAMPLES = {  # of a key below a pattern
    OPTIMIZATION: f"{OPTIMIZATION}.warmup_steps",
    "model.init_args*.recompute": "model.init_args.network.init_args.recompute",
}
CHANGED = {
    f"{OPTIMIZATION}.freeze": ["*"],
    "model.init_args.cascade": None,  # below, with a cascade
    f"{OPTIMIZATION}.lr_scales": {"network.*": 1.0},
    "trainer.precision": "bf16-mixed",
    "trainer.accumulate_grad_batches": 3,
    f"{OPTIMIZER}.betas": [0.5, 0.6],
    "init_from": None,
    "ckpt_path": "run/checkpoints/last.ckpt",
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.keys[0])
def test_each_rule_holds(rule, resume):
    """One change for each pattern of the table: refused with key and both values, or named, or not compared."""
    for pattern in rule.keys:
        key = EXAMPLES.get(pattern, pattern.replace("*", "x").replace("?", "x"))
        new = CHANGED.get(key, 0.123)
        if new is None:
            continue
        now = yaml.safe_load(yaml.safe_dump(resume.now))
        place = now
        *parents, last = key.split(".")
        for name in parents:
            place = place.setdefault(name, {}) if isinstance(place.get(name, {}), dict) else place.update({name: {}})
            if place is None:
                pytest.fail(f"{key} is below a value")
        place[last] = new
        stage = make_stage(now) if "lr_scales" in key else resume.stage
        attempt = replace(resume, now=now, stage=stage)
        if rule.outcome == resume_rules.REFUSED or key == "model.init_args.seed":
            with pytest.raises(InputError, match=rf"{last}.* was .* in the run of run/.* and is now .*; restore it"):
                check_changes(attempt)
            attempt = replace(attempt, on_change="warn")
        if rule.outcome == resume_rules.NOT_COMPARED:
            assert check_changes(attempt) == []
        elif rule.outcome != resume_rules.REFUSED:
            line = describe(check_changes(attempt))
            assert line.startswith("resume: ")
            assert key in line
            assert ("(no effect)" in line) == (rule.outcome == resume_rules.NO_EFFECT)


@pytest.mark.parametrize(
    ("key", "old", "new", "reason"),
    [
        ("trainer.precision", None, "64-true", "another type"),
        ("trainer.precision", "64-true", "32-true", "another type"),
        ("trainer.accumulate_grad_batches", 1, 4, "6 batches so far are not whole steps of 4"),
        (f"{OPTIMIZATION}.lr_scales", None, {"*.bias": 0.5}, "groups of parameters"),
        ("init_from", None, "cascade#base", "would not be used"),
        ("ckpt_path", None, "other/checkpoints/last.ckpt", "would not be used"),
    ],
)
def test_values_that_do_not_fit_are_refused(resume, key, old, new, reason):
    before, now = (yaml.safe_load(yaml.safe_dump(resume.now)) for _ in range(2))
    set_at(before, key, old)
    set_at(now, key, new)
    stage = make_stage(now) if "lr_scales" in key else resume.stage
    with pytest.raises(InputError, match=reason):
        check_changes(replace(resume, before=before, now=now, stage=stage))


def test_differences_are_keys_and_absent_is_null():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": None, "e": {"f": 1}}
    new = {"a": {"b": 1.0, "c": [1, 3]}, "e": None, "g": 2}
    assert list(differences(old, new)) == [
        Change("a.c", [1, 2], [1, 3]),
        Change("e", {"f": 1}, None),
        Change("g", None, 2),
    ]


def test_a_default_optimization_may_be_written_out(resume):
    before = yaml.safe_load(yaml.safe_dump(resume.now))
    before["model"]["init_args"]["optimization"] = None
    changes = check_changes(replace(resume, before=before))
    assert describe(changes) == f"resume: {OPTIMIZER}.lr 0.001 -> 0.01"


# ---- real runs


def test_new_learning_rates_and_betas_act_at_once_and_are_named(run, cli, capsys):
    before = checkpoint(run)
    options = [f"--{OPTIMIZER}.lr", "0", f"--{OPTIMIZER}.betas", "[0.5, 0.6]", f"--{OPTIMIZER}.weight_decay", "0.25"]
    assert cli("fit", "--run", run, "--resume", "--trainer.max_steps", 3, *options) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("resume: ")]
    for part in ("lr 0.01 -> 0", "betas [0.9, 0.999] -> [0.5, 0.6]", "weight_decay 0.01 -> 0.25", "max_steps 2 -> 3"):
        assert part in line
    after = checkpoint(run)
    (group,) = after["optimizer_states"][0]["param_groups"]
    assert (group["lr"], list(group["betas"]), group["weight_decay"]) == (0.0, [0.5, 0.6], 0.25)
    assert after["lr_schedulers"][0]["base_lrs"] == [0.0]
    for name, value in before["current_model_state"].items():  # nothing moves at a learning rate of 0
        assert torch.equal(value, after["current_model_state"][name])
    assert after["config"]["model"]["init_args"]["optimization"]["optimizer"]["init_args"]["lr"] == 0


def test_a_configuration_edited_by_hand_and_another_folder_s_checkpoint_follow_the_rules(run, cli, capsys):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("max_steps: 2", "max_steps: 3").replace("drop: 0.1", "drop: 0.2"))
    resume = ["fit", "--run", run, "--resume"]
    assert "text.drop was 0.1" in refusal(cli, capsys, *resume)
    (run / "config.yaml").write_text(text)
    old = ["--ckpt_path", run / "checkpoints/last.ckpt", "--run", "new"]
    fresh = ["fit", "--config", "stage.yaml", "--trainer.max_steps", 3, *old]
    assert "text.drop was 0.1" in refusal(cli, capsys, *fresh, "--model.init_args.text.drop", 0.2)
    assert cli(*fresh, f"--{OPTIMIZER}.lr", "1e-6") == 0
    assert "optimizer.init_args.lr 0.01 -> 1e-06" in capsys.readouterr().err
    assert checkpoint("new")["optimizer_states"][0]["param_groups"][0]["lr"] == 1e-6
    line = refusal(cli, capsys, *resume, "--ckpt_path", "new/checkpoints/last.ckpt")
    assert "the run resumes from run/checkpoints/step-2.ckpt" in line


@pytest.mark.parametrize(
    "options",
    [
        [f"--{OPTIMIZATION}.freeze", '["*.bias"]'],
        [f"--{OPTIMIZATION}.lr_scales", '{"*.bias": 0.5}'],
        [f"--{OPTIMIZATION}.optimizer", "torch.optim.SGD"],
        [f"--{OPTIMIZATION}.optimizer", "torch.optim.Adafactor"],
        [f"--{OPTIMIZER}.amsgrad", "true"],
        ["--trainer.precision", "64-true"],
        ["--model.init_args.network.init_args.dropout", "0.3"],
        ["--model.init_args.diffusion", '{"parametrization": {"class_path": "imagen_lightning.diffusion.Epsilon"}}'],
        ["--model.init_args.text.encoder.init_args.seed", "3"],
        ["--init_from", "cascade#base"],
    ],
    ids=lambda options: options[0][2:],
)
def test_what_cannot_be_resumed_is_refused_before_anything_is_touched(run, cli, capsys, options):
    line = refusal(cli, capsys, "fit", "--run", run, "--resume", "--trainer.max_steps", 4, *options)
    assert "step-2.ckpt and is now" in line
    assert len(line) < 420


def test_another_alpha_is_refused(cli, capsys):
    write("stage.yaml", **{"model/init_args/adapter": LORA, "trainer/max_steps": 1})
    assert cli("fit", "--config", "stage.yaml", "--run", "run") == 0
    options = ["--trainer.max_steps", 2, "--model.init_args.adapter.init_args.alpha", 64]
    assert "alpha was 2.0" in refusal(cli, capsys, "fit", "--run", "run", "--resume", *options)


def test_any_end_leaves_the_run_resumable(run, cli, monkeypatch):
    before = contents(run)
    options = ["fit", "--run", run, "--resume", "--trainer.max_steps", 4, f"--{OPTIMIZER}.lr", "0.5"]
    for error in (RuntimeError, KeyError, KeyboardInterrupt, MemoryError):
        with monkeypatch.context() as patch:
            patch.setattr(NoiseLevelLoss, "on_train_start", raising(error))
            try:
                code = cli(*options)
            except (error, SystemExit):
                code = 1
        assert code != 0
        assert {path: text for path, text in contents(run).items() if path.name != "metrics.csv"} == {
            path: text for path, text in before.items() if path.name != "metrics.csv"
        }
    assert cli("fit", "--run", run, "--resume", "--trainer.max_steps", 3) == 0
    assert checkpoint(run)["optimizer_states"][0]["param_groups"][0]["lr"] == 0.01


def raising(error):
    def hook(*_):
        raise error("planted")

    return hook


# ---- starts


@pytest.mark.parametrize(
    "options",
    [
        [f"--{OPTIMIZER}.lr", "-1"],
        [f"--{OPTIMIZER}.lr", ".nan"],
        [f"--{OPTIMIZER}.weight_decay", ".inf"],
        ["--seed", "-1"],
        ["--seed_everything", str(2**32)],
        ["--model.init_args.seed", "-1"],
        ["--data.init_args.seed", str(2**64)],
        ["--data.init_args.num_workers", "-1"],
        ["--data.init_args.batch_size", "0"],
        ["--trainer.accumulate_grad_batches", "0"],
        ["--trainer.devices", "0"],
        ["--model.init_args.network.init_args.patch_size", "0"],
        ["--model.init_args.network.init_args.groups", "-1"],
        ["--model.init_args.network.init_args.text_projection", str(2**60)],
        ["--trainer.precision", "16-true"],
        ["--trainer.precision", "bf16-true"],
    ],
    ids=" ".join,
)
def test_a_start_that_cannot_train_is_one_line_and_leaves_nothing(cli, capsys, options):
    line = refusal(cli, capsys, "fit", "--config", "stage.yaml", "--run", "a/b/run", *options)
    assert len(line) < 420
    assert {path.name for path in Path().iterdir()} == {"stage.yaml"}


def test_a_start_that_trained_nothing_removes_only_what_it_made(cli, monkeypatch):
    Path("a/run").mkdir(parents=True)
    for error, place in ((RuntimeError, "a/run"), (KeyError, "a/new/run")):
        with monkeypatch.context() as patch:
            patch.setattr(NoiseLevelLoss, "on_train_start", raising(error))
            with pytest.raises(error):
                cli("fit", "--config", "stage.yaml", "--run", place)
    assert {str(path) for path in Path().rglob("*")} == {"stage.yaml", "a", "a/run"}
    Path("a/run/notes.txt").write_text("mine")
    assert cli("fit", "--config", "stage.yaml", "--run", "a/run") == 2
    assert {path.name for path in Path("a/run").iterdir()} == {"notes.txt"}


def test_a_run_that_trained_without_a_checkpoint_stays(cli, capsys, monkeypatch):
    monkeypatch.setattr(Checkpoint, "_save", raising(RuntimeError))
    with pytest.raises(RuntimeError, match="planted"):
        cli("fit", "--config", "stage.yaml", "--run", "run")
    assert {"config.yaml", "run.json", "metrics.csv"} <= {path.name for path in Path("run").iterdir()}
    assert "begins anew" in refusal(cli, capsys, "fit", "--config", "stage.yaml", "--run", "run")


def test_there_is_no_run_to_resume(cli, capsys):
    assert "TYPO holds no run to resume; check --run" in refusal(cli, capsys, "fit", "--run", "TYPO", "--resume")
    line = refusal(cli, capsys, "validate", "--config", "stage.yaml", "--run", "TYPO")
    assert "validate needs a trained stage" in line


MIXED = [pytest.param(name, marks=pytest.mark.slow) for name in ("32-true", "bf16-mixed", "16-mixed")]


@pytest.mark.parametrize("precision", ["64-true", *MIXED])
def test_each_precision_trains_and_resumes(cli, precision):
    options = ["--config", "stage.yaml", "--trainer.precision", precision]
    assert cli("fit", *options, "--run", "whole", "--trainer.max_steps", 2) == 0
    assert cli("fit", *options, "--run", "parts", "--trainer.max_steps", 1) == 0
    assert cli("fit", "--run", "parts", "--resume", "--trainer.max_steps", 2) == 0
    whole, parts = checkpoint("whole"), checkpoint("parts")
    for part in ("state_dict", "current_model_state"):
        for name, value in whole[part].items():
            assert torch.equal(value, parts[part][name])
            assert value.dtype == (torch.float64 if precision == "64-true" else torch.float32)


# ---- the lock


def test_a_run_folder_belongs_to_one_process(cli, capsys):
    write("stage.yaml", **{"trainer/max_steps": 100_000, "trainer/val_check_interval": 100_000})
    command = [sys.executable, "-m", "imagen_lightning", "fit", "--config", "stage.yaml", "--run", "run"]
    environment = {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment) as holder:
        deadline = time.monotonic() + 120
        while not Path("run/.lock.holder").exists() and holder.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        try:
            assert cli("fit", "--run", "run", "--config", "stage.yaml") == 2
            capsys.readouterr()
            assert cli("fit", "--run", "run", "--config", "stage.yaml", "--resume") == 2
            line = capsys.readouterr().err
            assert f"run folder run is in use by process {holder.pid} on " in line
            assert "wait for its end, or choose another --run" in line
        finally:
            holder.kill()
    assert cli("fit", "--config", "stage.yaml", "--run", "run", "--resume", "--trainer.max_steps", 1) == 0  # at once
    assert not Path("run/.lock.holder").exists()
