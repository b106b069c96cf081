"""Sweeps of this package's own verbs: a tiny stage is trained, a tiny cascade evaluated; and the agent's folders."""

import json
import signal
from contextlib import ExitStack

import pytest
import yaml
from optuna.trial import TrialState

from imagen_lightning.callbacks import wandb_logger
from imagen_lightning.callbacks.run_folder import read_run_info
from imagen_lightning.cli.evaluate import agent_folder
from imagen_lightning.cli.fit_arguments import prepare
from imagen_lightning.cli.sweep_check import EVALUATION_METRICS
from imagen_lightning.sweeps.metric import evaluation_values

DISTANCES = ("FD-random", "KD-random")

STAGE = {
    "run": "runs/tiny",
    "model": {
        "class_path": "imagen_lightning.stages.BaseStage",
        "init_args": {
            "image_size": 8,
            "network": {
                "class_path": "imagen_lightning.networks.UNet",
                "init_args": {
                    **{"dim": 8, "multipliers": [1], "num_blocks": 1, "attention": [True], "text_dim": 8},
                    **{"groups": 4, "head_dim": 8},
                },
            },
            "text": {"encoder": {"class_path": "imagen_lightning.text.TinyTextEncoder", "init_args": {"dim": 8}}},
            "sampling": {"num_steps": 2},
            "optimization": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}},
        },
    },
    "data": {
        "class_path": "imagen_lightning.data.ShapesDataModule",
        "init_args": {"image_size": 8, "batch_size": 4, "num_val": 4},
    },
    "trainer": {"accelerator": "cpu", "max_steps": 6, "val_check_interval": 2, "log_every_n_steps": 1},
    "throughput": {"measure_matmul": False},
}


@pytest.fixture
def stage(tmp_path):
    path = tmp_path / "stage.yaml"
    path.write_text(yaml.safe_dump(STAGE))
    return path


@pytest.mark.slow
def test_two_trainings_from_one_file(sweeps, stage, wait):
    file = sweeps.write(
        program="imagen-lightning",
        command=["${program}", "fit", "--config", str(stage), "${args}"],
        metric={"name": "val/loss"},
        parameters={
            "model.init_args.optimization.optimizer.init_args.lr": {"values": [0.01, 0.001]},
            "seed": {"value": 5},
            "ema": {"parameters": {"decay": {"value": 0.5}}},
        },
    )
    process = sweeps.start(file, WANDB_MODE="disabled", OMP_NUM_THREADS="1")
    wait(lambda: (sweeps.out / "trials" / "0000" / "config.yaml").exists(), 90)
    process.send_signal(signal.SIGKILL)  # of the sweep; its trial is ended with it and gone on with
    process.wait()
    output = sweeps.run(file, WANDB_MODE="disabled", OMP_NUM_THREADS="1")
    trials = sweeps.trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 2, output
    for number, (trial, rate) in enumerate(zip(trials, (0.01, 0.001))):
        run = sweeps.out / "trials" / f"{number:04d}"
        config = yaml.safe_load((run / "config.yaml").read_text())
        model = config["model"]["init_args"]
        assert model["optimization"]["optimizer"]["init_args"]["lr"] == rate
        assert (config["seed_everything"], model["seed"], config["data"]["init_args"]["seed"]) == (5, 5, 5)
        assert config["ema"]["decay"] == 0.5
        assert len(trial.intermediate_values) == 3  # validations
        assert trial.value == list(trial.intermediate_values.values())[-1]
        assert (run / "checkpoints" / "last.ckpt").exists()


@pytest.mark.slow
def test_evaluations_share_what_they_draw(sweeps, tmp_path):
    from torch import nn

    from imagen_lightning.cascade import Cascade
    from imagen_lightning.diffusion.random import seeded_generator
    from imagen_lightning.networks import EfficientUNet, UNet
    from imagen_lightning.stages import BaseStage, Sampling, SuperResolutionStage, TextSettings
    from imagen_lightning.text import TinyTextEncoder

    small = {"dim": 8, "multipliers": [1, 2], "num_blocks": 1, "head_dim": 8, "groups": 4, "text_dim": 16}
    text = TextSettings(TinyTextEncoder(dim=16, max_tokens=64))
    base = BaseStage(8, UNet(**small, attention=[False, True]), text=text, sampling=Sampling(num_steps=2, guidance=2.0))
    network = EfficientUNet(**small, attention=["none", "cross"])
    above = SuperResolutionStage(16, 8, network, text=text, sampling=Sampling(num_steps=1, guidance=1.0))
    for number, made in enumerate((base, above)):
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.15, generator=seeded_generator(0, 0, number))
    Cascade([base, above]).save(tmp_path / "cascade")
    file = sweeps.write(
        program="imagen-lightning",
        command=["${program}", "evaluate", str(tmp_path / "cascade"), "--data=shapes", "--num=4", "${args}"],
        metric={"name": "FD-random"},
        parameters={"guidance": {"values": ["base=1.5"]}, "aug-level": {"values": [0.0, 0.1]}},
    )
    output = sweeps.run(file, OMP_NUM_THREADS="1")
    trials = sweeps.trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 2, output
    for number, trial in enumerate(trials):
        found = json.loads((sweeps.out / "trials" / f"{number:04d}" / "evaluation.json").read_text())
        assert evaluation_values(sweeps.out / "trials" / f"{number:04d}").keys() <= {*EVALUATION_METRICS, *DISTANCES}
        whole = next(row for row in found["rows"] if row["input"] == "chain")
        assert trial.value == next(value["value"] for value in whole["values"] if value["metric"] == "FD-random")
        assert all((sweeps.out / "trials" / f"{number:04d}" / row["samples"]).is_file() for row in found["rows"][:3])
    drawn = [path.name for path in (sweeps.out / "samples").iterdir() if path.is_dir()]
    assert sum(name.startswith("base-text-") for name in drawn) == 1  # both levels stand behind the same pictures
    assert sum(name.startswith("sr_16-chain-") for name in drawn) == 2


# ---- under W&B's agent


def test_an_agent_s_run_has_its_folder_and_its_identity(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SWEEP_ID", "sw33p")
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    stack = ExitStack()
    words = prepare("fit", ["--config", str(stage), "--seed=3"], stack)
    assert words[-2:] == ["--run", "runs/tiny/sw33p/abc123"]
    assert "--seed_everything=3" in words
    assert prepare("fit", ["--config", str(stage), "--run", "runs/mine"], stack)[-1] == "runs/mine"
    assert agent_folder(tmp_path) == tmp_path / "sw33p" / "abc123"
    wandb_logger(tmp_path / "run", "project", {})
    assert read_run_info(tmp_path / "run")["wandb_id"] == "abc123"


def test_a_seed_in_a_yaml_is_refused(stage, tmp_path, monkeypatch, capsys):
    from imagen_lightning.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["imagen-lightning"])
    stage.write_text(yaml.safe_dump(STAGE | {"seed": 3}))
    assert main(["fit", "--config", str(stage), "--run", "runs/new"]) == 2
    assert "seed is an option of the command line" in capsys.readouterr().err
