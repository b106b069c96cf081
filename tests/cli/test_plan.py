"""`imagen-lightning plan` of what ships and of what does not fit."""

import json
import re

import pytest
import torch
import yaml

from imagen_lightning.cascade import Cascade
from imagen_lightning.cli.main import main
from imagen_lightning.networks import PatchTransformer
from imagen_lightning.stages import BaseStage, TextSettings
from imagen_lightning.text import TinyTextEncoder

STAGE = {
    "model": {
        "class_path": "imagen_lightning.stages.SuperResolutionStage",
        "init_args": {
            "image_size": 32,
            "low_res_size": 16,
            "network": {
                "class_path": "imagen_lightning.networks.EfficientUNet",
                "init_args": {"dim": 32, "multipliers": [1, 2], "attention": ["none", "self"], "text_dim": 128},
            },
            "text": {"encoder": {"class_path": "imagen_lightning.text.TinyTextEncoder"}},
        },
    },
    "data": {"class_path": "imagen_lightning.data.ShapesDataModule", "init_args": {"image_size": 32, "batch_size": 4}},
    "trainer": {"max_steps": 5},
}


@pytest.fixture
def stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(STAGE))
    return "stage.yaml"


def figure(text, row):
    return re.search(rf"^  {re.escape(row)} +([\d.]+ ?\w+)", text, re.MULTILINE)[1]


def test_a_stage_of_the_papers_size_is_planned_without_its_memory(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["experiments/paper/base_64.yaml", "--data.init_args.batch_size=8", "--json", "plan.json"]
    before = torch.get_default_dtype()
    assert main(["plan", *arguments]) == 0
    text = capsys.readouterr().out
    assert figure(text, "network") == "2.39 G"
    assert figure(text, "weights") == "9.55 GB"
    assert "google/t5-v1_1-xxl" in text
    assert "4.76 G" in text  # its encoder, known without its files
    plan = json.loads((tmp_path / "plan.json").read_text())["plan"]
    assert plan["weights"] == plan["average"]
    assert 0 <= plan["step"]["gradients"] - plan["weights"] < 1e6  # a GPU's allocator rounds them up to 512 bytes each
    assert plan["peak"] > 3 * plan["weights"] + plan["encoder_memory"]
    forward = 8 * 1.582e12  # of one image, as the YAML's head has it; a backward pass is two, recomputation one at most
    assert 3 * forward < plan["flops"] < 4 * forward
    assert torch.get_default_dtype() == before


def test_what_is_advised_fits(stage, capsys, tmp_path):
    assert main(["plan", stage, "--json", "plan.json"]) == 0
    peak = json.loads((tmp_path / "plan.json").read_text())["plan"]["peak"]
    memory = f"{(1.05 * 0.95 * peak + 1e9) / 1e6:.3f}MB"
    capsys.readouterr()
    assert main(["plan", stage, "--memory", memory]) == 0
    text = capsys.readouterr().out
    assert "does not fit as it is" in text
    overrides = re.findall(r"^    (--\S+)$", text, re.MULTILINE)
    assert overrides
    assert main(["plan", "--config", stage, *overrides, "--memory", memory]) == 0
    assert "fits as it is" in capsys.readouterr().out


def test_a_stage_of_a_cascade_is_planned_without_reading_its_weights(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = TextSettings(TinyTextEncoder(64))
    network = PatchTransformer(dim=64, num_layers=2, patch_size=4, bottleneck=16, text_dim=64, head_dim=16)
    Cascade([BaseStage(16, network, text)]).save("cascade")
    model = {"class_path": "imagen_lightning.finetuning.from_cascade", "init_args": {"cascade": "cascade"}}
    model["init_args"] |= {"adapter": {"class_path": "imagen_lightning.networks.LoRA"}, "dtype": "bfloat16"}
    data = {"class_path": "imagen_lightning.data.ShapesDataModule", "init_args": {"image_size": 16, "batch_size": 4}}
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump({"model": model, "data": data, "trainer": {"max_steps": 5}}))
    monkeypatch.setattr("imagen_lightning.cascade.weights.read_tensors", None)
    assert main(["plan", "tune.yaml", "--json", "plan.json"]) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())["plan"]
    adapter, base = plan["parameters"]["adapter"], plan["parameters"]["network"]
    assert adapter["total"] == adapter["trained"] > 0 == base["trained"]
    assert plan["weights"] == 4 * adapter["total"] + 2 * base["total"]
    assert plan["average"] == 4 * adapter["total"]


def test_any_optimizer_of_8_bits_is_named_trained_saved_and_planned(stage, capsys, tmp_path):
    optimizer = "--model.init_args.optimization.optimizer=eight_bits.BlockwiseMomentum"  # tests/planning
    assert main(["plan", stage, optimizer, "--json", "plan.json"]) == 0
    assert "eight_bits.BlockwiseMomentum: its state made on the meta device" in capsys.readouterr().out
    assert main(["fit", "--config", stage, "--run", "run", optimizer, "--trainer.accelerator=cpu"]) == 0
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    held = sum(value.nbytes for state in saved.values() for value in state.values())
    assert {value.dtype for state in saved.values() for value in state.values()} == {torch.int8, torch.float32}
    assert json.loads((tmp_path / "plan.json").read_text())["plan"]["optimizer"]["state"] == held


def test_a_real_step_stands_beside_the_estimate(stage, capsys):
    assert main(["plan", stage, "--device", "cpu", "--measure"]) == 0
    found = re.search(r"measured peak .* the estimate is ([+-]\d+\.\d)%", capsys.readouterr().out)
    assert abs(float(found[1])) < 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which stage?"),
        (["no.yaml"], "'no.yaml' does not exist"),
        (["stage.yaml", "--memory", "24"], "'24' is not an amount"),
        (["stage.yaml", "--memory", "200MB"], "--memory 200 MB is no more than the 1.00 GB that a GPU's context"),
        (["stage.yaml", "--tokens", "0"], "argument --tokens: '0' is outside [1, 100000]"),
        (["stage.yaml", "--trainer.devices=3"], "batch_size 4 is not a multiple of the 3 processes"),
        (["stage.yaml", "--json", "stage.yaml"], "'stage.yaml' exists"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(stage, capsys, arguments, message):
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err
