"""`fit` and `validate` from a YAML: the run folder, resume, overlays, signals, and refusals of one line."""

import csv
import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from PIL import Image
from tiny_fit import STAGE, checkpoint, contents, refusal, write

from imagen_lightning.callbacks import NoiseLevelLoss
from imagen_lightning.cascade import Cascade
from imagen_lightning.cli import fit, fit_arguments
from imagen_lightning.cli.fit_arguments import prepare
from imagen_lightning.cli.main import main
from imagen_lightning.data.shards import ShardWriter
from imagen_lightning.io.atomic import temporary_path

SAMPLER = "model/init_args/sampling/sampler"
NETWORK = "model/init_args/network"
OPTIMIZER = "model/init_args/optimization/optimizer"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of three and of six steps."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["imagen-lightning"])
        write("stage.yaml")
        gc.collect()
        before = num_trainers()
        assert main(["fit", "--config", "stage.yaml", "--run", "three"]) == 0
        made = num_trainers() - before
        assert main(["fit", "--config", "stage.yaml", "--run", "six", "--trainer.max_steps", "6"]) == 0
    # A copy of the stage, such as the EMA's, must not have taken the trainer and its data along.
    assert made == 1
    return folder


def num_trainers():
    return sum(type(item) is Trainer for item in gc.get_objects())


def rows(run):
    with Path(run, "metrics.csv").open(newline="") as file:
        return [{key: row.get(key) for key in ("step", "train/loss", "val/loss")} for row in csv.DictReader(file)]


def assert_equal_checkpoints(run, other):
    first, second = checkpoint(run), checkpoint(other)
    assert first["global_step"] == second["global_step"]
    assert first["ShapesDataModule"] == second["ShapesDataModule"]
    for part in ("state_dict", "current_model_state"):
        assert first[part].keys() == second[part].keys()
        assert all(torch.equal(value, second[part][name]) for name, value in first[part].items())
    for number, state in first["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, second["optimizer_states"][0]["state"][number][name])


# ---- the run folder


def test_the_run_folder(trained):
    run = trained / "three"
    assert {path.name for path in run.iterdir()} == {
        ".lock",
        "config.yaml",
        "run.json",
        "metrics.csv",
        "checkpoints",
        "wandb",
    }
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-3.ckpt", "last.ckpt"}
    assert [row["step"] for row in rows(run)] == ["0", "1", "2"]
    assert [bool(row["val/loss"]) for row in rows(run)] == [False, False, True]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["run"] == "three"
    assert config["trainer"]["max_steps"] == 3
    assert config["model"]["init_args"]["network"]["init_args"]["patch_size"] == 1  # a default, written out
    info = json.loads((run / "run.json").read_text())
    assert info["command"] == "imagen-lightning fit --config stage.yaml --run three"
    assert list(run.glob(f"wandb/offline-run-*-{info['wandb_id']}"))


def test_a_second_run_in_the_folder_is_refused(trained, cli, capsys, tmp_path):
    shutil.copytree(trained / "three", tmp_path / "run", symlinks=True)
    line = refusal(cli, capsys, "fit", "--config", "stage.yaml", "--run", "run")
    assert "run holds a run already; add --resume" in line


def test_a_resumed_run_is_the_uninterrupted_one(trained, cli, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    shutil.copytree(trained / "three", run, symlinks=True)
    (tmp_path / "stage.yaml").write_text("model: {}\n")  # the run's own configuration is taken
    options = ["--config", "stage.yaml", "--run", "run", "--resume", "--trainer.max_steps", "6"]
    assert cli("fit", *options) == 0
    shown = capsys.readouterr().err
    assert "resuming run, configured by run/config.yaml" in shown
    assert "resume: trainer.max_steps 3 -> 6\n" in shown
    assert_equal_checkpoints(run, trained / "six")
    assert rows(run) == rows(trained / "six")
    earlier = json.loads((trained / "three" / "run.json").read_text())
    assert json.loads((run / "run.json").read_text()) == earlier
    assert {path.name.rpartition("-")[2] for path in run.glob("wandb/offline-run-*")} == {earlier["wandb_id"]}
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["run"], config["trainer"]["max_steps"]) == ("run", 6)

    before = contents(run)
    assert cli("fit", "--run", "run", "--resume") == 0
    assert "has trainer.max_steps 6 behind it" in capsys.readouterr().err
    assert contents(run) == before


def test_a_run_killed_before_its_first_checkpoint_begins_anew(trained, cli, tmp_path):
    shutil.copytree(trained / "three", tmp_path / "run", symlinks=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert cli("fit", "--run", "run", "--resume") == 0
    assert_equal_checkpoints("run", trained / "three")
    assert rows("run") == rows(trained / "three")


def test_a_run_s_configuration_makes_the_same_run_again(trained, cli):
    assert cli("fit", "--config", trained / "three" / "config.yaml", "--run", "again") == 0
    assert_equal_checkpoints("again", trained / "three")


def test_resume_without_a_run_begins_one(trained, cli):
    write("stage.yaml", run="runs/new")
    assert cli("fit", "--config=stage.yaml", "--resume") == 0
    assert_equal_checkpoints("runs/new", trained / "three")


def test_a_resume_that_is_refused_changes_nothing(trained, cli, capsys, tmp_path):
    shutil.copytree(trained / "three", tmp_path / "run", symlinks=True)
    resume = ["fit", "--run", "run", "--resume", "--trainer.max_steps", "9"]
    line = refusal(cli, capsys, *resume, "--model.init_args.network.init_args.dim", "16")
    assert "network.init_args.dim was 8 in the run of run/checkpoints/step-3.ckpt and is now 16: architecture" in line
    capsys.readouterr()
    before = {path: text for path, text in contents("run").items() if "wandb" not in path.parts}
    assert cli(*resume, "--data.init_args.image_size", "16") == 2
    assert "(16, 16) px to a stage of 8 px" in capsys.readouterr().err
    assert {path: text for path, text in contents("run").items() if "wandb" not in path.parts} == before


def test_another_order_is_refused_unless_accepted(trained, cli, capsys, tmp_path, caplog):
    def resume(*more):
        return cli("fit", "--run", "run", "--resume", "--trainer.max_steps", 4, *more)

    shutil.copytree(trained / "three", tmp_path / "run", symlinks=True)
    before = {path: text for path, text in contents("run").items() if "wandb" not in path.parts}
    for more, words in (
        (["--data.init_args.seed", 5], ["data seed 0", "now has data seed 5", "restore"]),
        (["--model.init_args.seed", 5], ["model.init_args.seed was 0", "is now 5", "restore"]),
    ):
        assert resume(*more) == 2
        (line,) = [text for text in capsys.readouterr().err.splitlines() if "imagen-lightning: error:" in text]
        assert all(word in line for word in [*words, "--on_change warn"])
        assert {path: text for path, text in contents("run").items() if "wandb" not in path.parts} == before
    assert resume("--data.init_args.seed", 5, "--on_change", "warn", "--data.init_args.batch_size", 8) == 0
    assert "data seed 0; the data now has data seed 5" in caplog.text
    assert "took 4 samples and takes 8 now" in caplog.text
    assert checkpoint("run")["ShapesDataModule"] == {"position": 20, "order": {"seed": 5}, "samples_per_step": 8}
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (config["on_change"], config["data"]["init_args"]["seed"]) == ("refuse", 5)


def test_a_run_killed_before_its_end_is_ended(trained, cli, capsys, tmp_path):
    shutil.copytree(trained / "three", tmp_path / "run", symlinks=True)
    lines = Path("run/metrics.csv").read_text()
    Path("run/checkpoints/last.ckpt").unlink()
    Path("run/metrics.csv").write_text("\n".join(lines.splitlines()[:3]) + "\n")
    assert cli("fit", "--run", "run", "--resume") == 0
    assert rows("run")[2]["val/loss"] == rows(trained / "three")[2]["val/loss"]
    assert_equal_checkpoints("run", trained / "three")
    capsys.readouterr()
    assert cli("fit", "--run", "run", "--resume") == 0
    assert "has trainer.max_steps 3 behind it" in capsys.readouterr().err


def test_a_run_killed_while_its_configuration_was_written_begins_anew(cli):
    Path("run").mkdir()
    temporary_path(Path("run/config.yaml")).write_text("model:")
    assert cli("fit", "--config", "stage.yaml", "--run", "run", "--resume", "--trainer.max_steps", 1) == 0
    assert checkpoint("run")["global_step"] == 1


def test_other_processes_of_a_run_do_not_refuse_its_folder(trained, cli, monkeypatch):
    monkeypatch.setattr(fit_arguments.rank_zero_only, "rank", 1)
    run = trained / "three"
    arguments = ["--config", str(run / "config.yaml"), "--run", str(run)]
    with ExitStack() as stack:
        assert prepare("fit", arguments, stack) == arguments


def test_a_trial_run_leaves_the_folder_free(cli):
    assert cli("fit", "--config", "stage.yaml", "--run", "run", "--trainer.fast_dev_run", "true") == 0
    assert not Path("run").exists()


def test_progress_is_shown_unless_switched_off(cli, capsys):
    for run, options, shown in (("a", [], True), ("b", ["--trainer.enable_progress_bar", "false"], False)):
        assert cli("fit", "--config", "stage.yaml", "--run", run, *options) == 0
        assert ("training BaseStage" in capsys.readouterr().err) == shown


# ---- configuration


def test_overlays_and_options_in_order(cli, capsys):
    overlay = {"trainer": {"max_steps": 9, "gradient_clip_val": 0.5}, "model": {"init_args": {"seed": 7}}, "run": "a"}
    Path("overlay.yaml").write_text(yaml.safe_dump(overlay))
    with pytest.raises(SystemExit) as end:
        cli("fit", "--trainer.max_steps", 11, "--config", "stage.yaml", "--config", "overlay.yaml", "--print_config")
    assert not end.value.code
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["trainer"]["max_steps"] == 11
    assert config["trainer"]["gradient_clip_val"] == 0.5
    assert config["model"]["init_args"]["seed"] == 7
    assert config["model"]["init_args"]["image_size"] == 8
    assert config["run"] == "a"
    assert {path.name for path in Path().iterdir()} == {"stage.yaml", "overlay.yaml"}


@pytest.mark.parametrize(
    ("optimizer", "arguments", "state"),
    [
        ("torch.optim.Adafactor", {"lr": 0.01}, "row_var"),
        ("torch.optim.AdamW", {"lr": 0.01, "betas": [0.8, 0.9], "weight_decay": 0.1}, "exp_avg_sq"),
        ("torch.optim.SGD", {"lr": 1.0, "momentum": 0.9}, "momentum_buffer"),
    ],
)
def test_any_optimizer(cli, optimizer, arguments, state):
    write("stage.yaml", **{OPTIMIZER: {"class_path": optimizer, "init_args": arguments}})
    assert cli("fit", "--config", "stage.yaml", "--run", "run", "--trainer.max_steps", 2) == 0
    saved = checkpoint("run")["optimizer_states"][0]
    assert state in saved["state"][0]
    group = saved["param_groups"][0]
    assert {name: list(group[name]) if name == "betas" else group[name] for name in arguments} == arguments
    assert group["weight_decay"] == arguments.get("weight_decay", 0.0)  # not AdamW's, the default optimizer's


def test_accumulation_and_clipping(cli):
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}}
    trainer = {**STAGE["trainer"], "max_steps": 2, "accumulate_grad_batches": 3, "gradient_clip_val": 1e-3}
    write("stage.yaml", trainer=trainer, **{OPTIMIZER: sgd, f"{NETWORK}/init_args/dropout": 0.0})
    assert cli("fit", "--config", "stage.yaml", "--run", "two") == 0
    assert cli("fit", "--config", "stage.yaml", "--run", "one", "--trainer.max_steps", 1) == 0
    two, one = checkpoint("two"), checkpoint("one")
    assert two["ShapesDataModule"]["position"] == 2 * 3 * 4
    moved = [one["current_model_state"][name] - value for name, value in two["current_model_state"].items()]
    assert torch.cat([item.flatten() for item in moved]).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_a_stage_starts_from_a_cascade_s(trained, cli, capsys):
    Cascade.from_checkpoints([trained / "three"]).save("cascade")
    write("stage.yaml", **{f"{OPTIMIZER}/init_args/lr": 0.0, "seed_everything": 5})
    options = ["fit", "--config", "stage.yaml", "--run", "run", "--trainer.max_steps", 1]
    assert "has 0 (base)" in refusal(cli, capsys, *options, "--init_from", "cascade#sr_64")
    assert "names no stage; write CASCADE#stage" in refusal(cli, capsys, *options, "--init_from", "cascade")
    assert "no cascade folder" in refusal(cli, capsys, *options, "--init_from", "elsewhere#base")
    assert cli(*options, "--init_from", "cascade#base") == 0
    wanted = checkpoint(trained / "three")["state_dict"]
    assert all(torch.equal(value, wanted[name]) for name, value in checkpoint("run")["state_dict"].items())


# ---- validate


def test_validate_gives_the_loss_of_training(trained, cli, capsys, tmp_path):
    config = ["--config", trained / "six" / "config.yaml"]
    wanted = float(rows(trained / "six")[-1]["val/loss"])
    for options in (["--ckpt_path", trained / "six/checkpoints/last.ckpt"], ["--run", trained / "six"]):
        assert cli("validate", *config, *options) == 0
        printed = capsys.readouterr().out
        assert float(printed.split("val/loss")[1].split()[1]) == pytest.approx(wanted, rel=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["stage.yaml"]


def test_verbs_that_the_stage_lacks_or_that_lack_a_checkpoint(trained, cli, capsys):
    config = ["--config", trained / "three" / "config.yaml", "--run", trained / "three"]
    assert "test_step" in refusal(cli, capsys, "test", *config)
    assert "predict" in refusal(cli, capsys, "predict", *config)
    assert "validate needs a trained stage" in refusal(cli, capsys, "validate", "--config", "stage.yaml")


class Planted:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_checkpoints_are_never_executed(cli, capsys, verb):
    torch.save({"state_dict": {"x": Planted()}, "global_step": 1}, "planted.ckpt")
    options = [verb, "--config", "stage.yaml", "--run", "run", "--ckpt_path", "planted.ckpt"]
    assert "never unpickled" in refusal(cli, capsys, *options)
    assert not Path("executed").exists()


def test_bad_checkpoints(trained, cli, capsys):
    whole = (trained / "three" / "checkpoints" / "last.ckpt").read_bytes()
    Path("empty.ckpt").touch()
    Path("cut.ckpt").write_bytes(whole[: len(whole) // 2])
    middle = len(whole) // 2
    Path("flipped.ckpt").write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    torch.save({"weights": torch.zeros(1)}, "foreign.ckpt")
    for verb, name, words in (
        ("validate", "empty.ckpt", "'empty.ckpt' is empty; take an earlier one"),
        ("fit", "cut.ckpt", "'cut.ckpt' cannot be read: it is damaged"),
        ("fit", "flipped.ckpt", "fails its checksum"),
        ("validate", "foreign.ckpt", "'foreign.ckpt' is not one of a run"),
        ("fit", "https://x.org/last.ckpt", "'https://x.org/last.ckpt' is an address; only local files are read"),
        ("validate", "last", "'last' does not exist; give a local file"),
    ):
        line = refusal(cli, capsys, verb, "--config", "stage.yaml", "--run", "run", "--ckpt_path", name)
        assert words in line


# ---- what is refused

REFUSED = [
    ({"trainer/max_steps": ...}, [], ["would never end", "trainer.max_steps"]),
    (
        {"model/class_path": "imagen_lightning.stages.BaseStag"},
        [],
        ["BaseStag'", "mean imagen_lightning.stages.BaseStage"],
    ),
    ({"model/class_path": "imagen_lightning.stage.BaseStage"}, [], ["imagen_lightning.stage.BaseStage", "spelling"]),
    ({"model/class_path": "nowhere.Stage"}, [], ["'nowhere.Stage' does not exist", "install its package"]),
    ({"model/class_path": "imagen_lightning.networks.UNet"}, [], ["no LightningModule", "stages.SuperResolutionStage"]),
    ({SAMPLER: {"class_path": "imagen_lightning.samplers.DDIX"}}, [], ["model.sampling.sampler", "samplers.DDIM?"]),
    ({SAMPLER: {"class_path": "imagen_lightning.samplers.Euler"}}, [], ["samplers.Euler", "use", "samplers.DDIM or"]),
    ({SAMPLER: "euler"}, [], ["'euler' is no class", "imagen_lightning.samplers.DPMSolverPP"]),
    ({f"{NETWORK}/class_path": "callbacks.EMA"}, [], ["callbacks.EMA", "write imagen_lightning.callbacks.EMA"]),
    ({"trainer/callbacks": [{"class_path": "callbacks.EMA"}]}, [], ["write imagen_lightning.callbacks.EMA"]),
    ({f"{NETWORK}/init_args/dimm": 8}, [], ["model.network.dimm: there is no such key", "did you mean dim?"]),
    ({f"{NETWORK}/init_args/dim": "wide"}, [], ["model.network.dim: expected int, got 'wide'"]),
    ({f"{OPTIMIZER}/init_args/lr": "high"}, [], ["model.optimization.optimizer.lr: expected float, got 'high'"]),
    ({f"{OPTIMIZER}/class_path": "torch.optim.Adafacto"}, [], ["did you mean torch.optim.Adafactor?"]),
    ({"model/init_args/imagesize": 8}, [], ["model.imagesize", "did you mean image_size?"]),
    ({"data/init_args/cut": 8}, [], ["data.cut: there is no such key; use batch_size or image_size"]),
    ({"trainer/max_step": 8}, [], ["trainer.max_step: there is no such key", "did you mean trainer.max_steps"]),
    ({"trainer/precision": "fp8"}, [], ["trainer.precision", "'bf16-mixed'", "got 'fp8'"]),
    ({"ema/decoy": 0.9}, [], ["ema.decoy", "did you mean ema.decay?"]),
    ({"ema/decay": 2.0}, [], ["decay 2.0 must be in [0, 1)"]),
    ({"dataa": 8}, [], ["dataa", "did you mean data?"]),
    ({"model": ...}, [], ["model is missing"]),
    ({}, ["--trainer.max_step", "8"], ["unknown arguments --trainer.max_step", "did you mean trainer.max_steps"]),
    ({}, ["--trainer.max_steps"], ["--trainer.max_steps: expected one argument"]),
    ({}, ["--trainer.accelerator", "abacus"], ["abacus"]),
    ({"data/init_args/image_size": 16}, [], ["(16, 16) px to a stage of 8 px; set data.init_args.image_size to 8"]),
    ({f"{NETWORK}/init_args/text_dim": 16}, [], ["text_dim is 16", "8 features"]),
    (
        {"model/init_args/optimization/lr_schedule": "cosine", "model/init_args/optimization/warmup_steps": 5},
        [],
        ["'cosine' needs trainer.max_steps above warmup_steps 5, got 3", "raise trainer.max_steps or lower"],
    ),
    (
        {"data": {"class_path": "imagen_lightning.data.LaionDataModule", "init_args": {"train": "no/*.tar"}}},
        [],
        ["no/*.tar"],
    ),
]


@pytest.mark.parametrize(("changes", "options", "words"), REFUSED, ids=lambda item: str(item)[:60])
def test_what_cannot_be_used_is_one_line_and_leaves_nothing(cli, capsys, changes, options, words):
    write("stage.yaml", **changes)
    line = refusal(cli, capsys, "fit", "--config", "stage.yaml", "--run", "run", *options)
    assert not Path("run").exists()
    assert all(word in line for word in words), line
    assert len(line) < 420


def test_a_schedule_that_is_too_long_is_refused_before_wandb_starts(cli, capsys, monkeypatch):
    monkeypatch.setattr(fit.StageCLI, "loggers", lambda self: pytest.fail("the loggers were made"))
    settings = {"lr_schedule": "cosine", "warmup_steps": 5}
    write("stage.yaml", **{f"model/init_args/optimization/{name}": value for name, value in settings.items()})
    assert "lower optimization.warmup_steps" in refusal(cli, capsys, "fit", "--config", "stage.yaml", "--run", "run")


def test_bad_files_and_folders(cli, capsys):
    Path("broken.yaml").write_text("model: [1, 2\n")
    Path("latin.yaml").write_bytes("run: café\n".encode("latin-1"))
    Path("text.yaml").write_text("hello\n")
    assert "fit needs a run folder" in refusal(cli, capsys, "fit", "--config", "stage.yaml")
    assert "--config needs a value" in refusal(cli, capsys, "fit", "--config")
    for name, words in (
        ("none.yaml", "configuration 'none.yaml' does not exist"),
        ("broken.yaml", "'broken.yaml' is not valid YAML"),
        ("latin.yaml", "'latin.yaml' is not UTF-8"),
        ("text.yaml", "'text.yaml' holds no keys"),
    ):
        for verb in ("fit", "validate"):
            assert words in refusal(cli, capsys, verb, "--config", name, "--run", "run")
    Path("full").mkdir()
    Path("full", "notes.txt").write_text("mine")
    for options in (["--run", "full"], ["--run=full", "--resume"], ["--run", "stage.yaml"]):
        line = refusal(cli, capsys, "fit", "--config", "stage.yaml", *options)
        assert "holds no run; choose another --run" in line
    line = refusal(cli, capsys, "fit", "--config", "stage.yaml", "--run", "stage.yaml/run")
    assert "run folder 'stage.yaml/run' cannot be used: Not a directory" in line


def test_a_run_stopped_for_bad_images_goes_on(cli, capsys, recwarn):
    Path("shards").mkdir()
    with ShardWriter(Path("shards"), "train", 60) as writer:
        for number in range(60):
            picture = io.BytesIO()
            Image.new("RGB", (8, 8), (number, 0, 0)).save(picture, "PNG")
            image = picture.getvalue() if number % 3 else b"broken"
            writer.write(f"{number:04d}", {"png": image, "txt": b"a picture"})
    data = {"train": "shards", "image_size": 8, "batch_size": 20}
    write("stage.yaml", data={"class_path": "imagen_lightning.data.LaionDataModule", "init_args": data})
    capsys.readouterr()
    assert cli("fit", "--config", "stage.yaml", "--run", "run", "--trainer.max_steps", 12) == 2
    step = checkpoint("run")["global_step"]
    assert f"raise the share; --resume continues from run/checkpoints/step-{step}.ckpt" in capsys.readouterr().err
    assert 0 < step < 11
    more = ["--data.init_args.max_skip_share", 0.5, "--trainer.max_steps", step + 1]
    assert cli("fit", "--run", "run", "--resume", *more) == 0
    assert checkpoint("run")["global_step"] == step + 1
    assert not [warning for warning in recwarn if "Total length" in str(warning.message)]  # of no validation shards


# ---- processes


def test_a_terminated_run_ends_with_a_checkpoint_and_goes_on(cli, tmp_path):
    write("stage.yaml", **{"trainer/max_steps": 100_000, "trainer/val_check_interval": 1000})
    command = [sys.executable, "-m", "imagen_lightning", "fit", "--config", "stage.yaml", "--run", "run"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"NETRC": "/dev/null", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run:
        deadline = time.monotonic() + 120
        while not Path("run/metrics.csv").exists() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        run.send_signal(signal.SIGTERM)
        out, err = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM, err
    assert "SIGTERM: the step is finished and a checkpoint written" in err
    assert "logging to W&B offline run" in err
    for noise in (
        "GPU available",
        "TPU available",
        "Seed set to",
        "Tip:",
        "LeafSpec",
        "wandb:",
        "Warning",
        "Traceback",
    ):
        assert noise not in out + err
    step = checkpoint("run")["global_step"]
    assert step >= 1
    assert len(rows("run")) == step
    assert cli("fit", "--run", "run", "--resume", "--trainer.max_steps", step + 2) == 0
    assert checkpoint("run")["global_step"] == step + 2
    assert [row["step"] for row in rows("run")] == [str(number) for number in range(step + 2)]


@pytest.mark.parametrize(("hook", "step"), [("on_train_start", 1), ("on_sanity_check_start", None)])
def test_a_signal_before_the_first_step(cli, monkeypatch, hook, step):
    monkeypatch.setattr(NoiseLevelLoss, hook, lambda *_: signal.raise_signal(signal.SIGTERM))
    options = ("--trainer.num_sanity_val_steps", "2", "--data.num_val", "8")
    assert cli("fit", "--config", "stage.yaml", "--run", "run", *options) == 143
    last = Path("run/checkpoints/last.ckpt")
    assert (checkpoint("run")["global_step"] if last.exists() else None) == step


@pytest.mark.slow
def test_two_processes_train_one_run_and_resume_it(cli):
    command = [sys.executable, "-m", "imagen_lightning", "fit", "--config", "stage.yaml", "--run", "run"]
    command += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for more in ([], ["--resume", "--trainer.max_steps", "5"]):
        done = subprocess.run([*command, *more], capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
    assert checkpoint("run")["global_step"] == 5
    assert checkpoint("run")["ShapesDataModule"]["position"] == 20
