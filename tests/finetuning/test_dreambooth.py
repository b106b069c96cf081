"""The shipped DreamBooth experiment, end to end on a tiny cascade."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from imagen_lightning.cascade import Cascade
from imagen_lightning.cli.main import main
from imagen_lightning.data import shapes
from imagen_lightning.networks import EfficientUNet, PatchTransformer
from imagen_lightning.stages import BaseStage, Sampling, SuperResolutionStage, TextSettings
from imagen_lightning.text import TinyTextEncoder

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "finetune" / "dreambooth.yaml"
SMALL = {"dim": 8, "multipliers": [1, 2], "num_blocks": 1, "head_dim": 8, "groups": 4, "text_dim": 16}


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """The command in a folder with a cascade of the quickstart's sizes, class images of it, and the experiment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(sys, "argv", ["imagen-lightning"])
    torch.manual_seed(0)
    text = TextSettings(TinyTextEncoder(16))
    network = PatchTransformer(dim=16, num_layers=1, patch_size=4, bottleneck=8, head_dim=8, text_dim=16)
    base = BaseStage(16, network, text, sampling=Sampling(num_steps=2))
    enlarge = EfficientUNet(**SMALL, attention=["none", "self"])
    sr = SuperResolutionStage(64, 16, enlarge, text, sampling=Sampling(num_steps=1, guidance=1.0))
    Cascade([base, sr]).save("runs/quickstart/cascade")
    Path("prompts.txt").write_text("\n".join(shapes.sample(1, i, "train")[1] for i in range(5)))
    config = yaml.safe_load(EXPERIMENT.read_text())
    config["trainer"] |= {"accelerator": "cpu", "max_steps": 4, "val_check_interval": 4, "log_every_n_steps": 1}
    config["trainer"]["callbacks"][0]["init_args"] |= {"every_n_steps": 4, "num_steps": 1}
    config["model"]["init_args"]["optimization"]["warmup_steps"] = 1
    config["data"]["init_args"]["batch_size"] = 4
    config["data"]["init_args"]["instance"]["init_args"]["num_val"] = 4
    Path("dreambooth.yaml").write_text(yaml.safe_dump({**config, "throughput": {"measure_matmul": False}}))
    return lambda *arguments: main([str(argument) for argument in arguments])


def draw(cli, *options):
    command = ["class-images", "runs/quickstart/cascade", "runs/dreambooth/class", "--prompts", "prompts.txt"]
    return cli(*command, "--num", 5, "--steps", 1, "--device", "cpu", *options)


def test_the_experiment_runs(cli):
    assert draw(cli, "--last-stage", "base") == 0
    assert cli("fit", "--config", "dreambooth.yaml") == 0
    checkpoint = torch.load("runs/dreambooth/base/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4
    before = Cascade.load("runs/quickstart/cascade").stages[0].state_dict()
    assert checkpoint["state_dict"].keys() == before.keys()
    assert any(not torch.equal(value, before[name]) for name, value in checkpoint["state_dict"].items())
    data = next(value for name, value in checkpoint.items() if name.endswith("DreamBoothDataModule"))
    assert data["position"] == 16
    assert {"share": "1/2"}.items() <= data["order"].items()
    drawn = json.loads(Path("runs/dreambooth/base/samples/0000004/samples.json").read_text())
    assert any("hourglass" in image["caption"] for image in drawn["images"])


def test_captions_encoded_once_give_the_same_run(cli):
    config = yaml.safe_load(Path("dreambooth.yaml").read_text())
    config["trainer"]["callbacks"].append({"class_path": "imagen_lightning.callbacks.EncodeOnce"})
    Path("once.yaml").write_text(yaml.safe_dump({**config, "run": "runs/dreambooth/once"}))
    assert draw(cli, "--last-stage", "base") == 0
    assert [cli("fit", "--config", name) for name in ("dreambooth.yaml", "once.yaml")] == [0, 0]
    live, once = (
        torch.load(f"runs/dreambooth/{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for run in ("base", "once")
    )
    assert all(torch.equal(value, once[name]) for name, value in live.items())
    grids = [Image.open(f"runs/dreambooth/{run}/samples/0000004/grid.png").tobytes() for run in ("base", "once")]
    assert grids[0] == grids[1]


def test_super_resolution_is_trained_on_its_own_outputs(cli):
    assert draw(cli) == 0
    config = yaml.safe_load(Path("dreambooth.yaml").read_text())
    config["model"]["init_args"]["stage"] = "sr_64"
    config["data"]["init_args"]["instance"]["init_args"]["image_size"] = 64
    config["trainer"]["callbacks"] = []
    Path("sr.yaml").write_text(yaml.safe_dump({**config, "run": "runs/dreambooth/sr"}))
    assert cli("fit", "--config", "sr.yaml") == 0


def test_class_images_of_another_cascade_are_refused(cli, capsys):
    assert draw(cli, "--last-stage", "base") == 0
    cascade = Cascade.load("runs/quickstart/cascade")
    cascade.stages[0].network.eval()
    with torch.no_grad():
        next(cascade.stages[0].network.parameters()).add_(1)
    cascade.save("runs/other")
    assert cli("fit", "--config", "dreambooth.yaml", "--model.init_args.cascade", "runs/other") == 2
    assert "were drawn by another cascade" in capsys.readouterr().err
    assert not Path("runs/dreambooth/base").exists()
