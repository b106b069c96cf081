"""The shipped textual inversion, end to end on a tiny cascade: a run, its word in a file, a cascade that draws it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from imagen_lightning.cascade import Cascade
from imagen_lightning.cli.main import main
from imagen_lightning.data.subjects import Subject
from imagen_lightning.networks import EfficientUNet, PatchTransformer
from imagen_lightning.stages import BaseStage, Sampling, SuperResolutionStage, TextSettings
from imagen_lightning.text import TinyTextEncoder, TransformerEncoder

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments" / "finetune"
SMALL = {"dim": 8, "multipliers": [1, 2], "num_blocks": 1, "head_dim": 8, "groups": 4, "text_dim": 16}
WORD = "tokens.vectors.<zib>"


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """The command in a folder with a cascade of the quickstart's sizes and the experiment, cut short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(sys, "argv", ["imagen-lightning"])
    torch.manual_seed(0)
    network = PatchTransformer(dim=16, num_layers=1, patch_size=4, bottleneck=8, head_dim=8, text_dim=16)
    base = BaseStage(16, network, TextSettings(TinyTextEncoder(16)), sampling=Sampling(num_steps=2))
    text = TextSettings(TinyTextEncoder(16), TransformerEncoder(16, 16, num_layers=1, num_heads=2))
    enlarge = EfficientUNet(**SMALL, attention=["none", "self"])
    sr = SuperResolutionStage(64, 16, enlarge, text, sampling=Sampling(num_steps=1, guidance=1.0))
    for parameter in [*base.parameters(), *sr.parameters()]:
        if parameter.abs().max() == 0:  # layers that begin at zero give no gradients
            torch.nn.init.normal_(parameter, std=0.2)
    Cascade([base, sr]).save("runs/quickstart/cascade")
    for name in ("textual_inversion.yaml", "textual_inversion_sr.yaml"):
        config = yaml.safe_load((EXPERIMENTS / name).read_text())
        config["trainer"] |= {"accelerator": "cpu", "max_steps": 4, "val_check_interval": 4, "log_every_n_steps": 1}
        config["trainer"]["callbacks"][0]["init_args"] |= {"every_n_steps": 4, "num_steps": 1}
        config["data"]["init_args"] |= {"batch_size": 4, "num_val": 4}
        config["checkpoint"]["every_n_steps"] = 2
        Path(name).write_text(yaml.safe_dump({**config, "throughput": {"measure_matmul": False}}))
    return lambda *arguments: main([str(argument) for argument in arguments])


def test_the_experiment_runs_and_its_word_is_shared(cli):
    assert cli("fit", "--config", "textual_inversion.yaml") == 0
    checkpoint = torch.load("runs/zib/base/checkpoints/last.ckpt", weights_only=True)
    old = Cascade.load("runs/quickstart/cascade")
    before = old.stages[0].state_dict()
    assert checkpoint["state_dict"].keys() - before.keys() == {WORD}
    assert all(torch.equal(checkpoint["state_dict"][name], value) for name, value in before.items())
    vectors = checkpoint["state_dict"][WORD]
    assert vectors.shape == (3, 16)
    star = old.stages[0].text.encoder.embed("star")
    assert (vectors - star).abs().amax(dim=1).gt(0).all()

    file = "runs/zib/zib.tokens.safetensors"
    assert cli("tokens", "runs/zib/base", file) == 0
    assert torch.equal(load_file(file)["<zib>"], vectors)
    assert cli("cascade", "runs/quickstart/cascade", "runs/zib/cascade", "--tokens", file) == 0
    assert cli("cascade", "runs/zib/base", "runs/quickstart/cascade#sr_64", "runs/zib/same", "--tokens", file) == 0
    taught, same = Cascade.load("runs/zib/cascade"), Cascade.load("runs/zib/same")
    captions = ["a <zib> on a white background", "a small red ring on a gray background"]
    drawn = taught.sample(captions, seed=1).images
    assert torch.equal(same.sample(captions, seed=1).images, drawn)
    assert torch.equal(old.sample(captions, seed=1).images[1], drawn[1])
    assert not torch.equal(old.sample(captions, seed=1).images[0], drawn[0])
    command = ["sample", "runs/zib/cascade", "--prompt", captions[0], "--out", "runs/zib/samples", "--device", "cpu"]
    assert cli(*command) == 0
    assert cli("evaluate", "runs/zib/cascade", "--data", "shapes", "--num", 4, "--out", "runs/zib/evaluation") == 0


def test_both_stages_learn_the_word(cli):
    for name in ("textual_inversion.yaml", "textual_inversion_sr.yaml"):
        assert cli("fit", "--config", name) == 0
    assert cli("cascade", "runs/zib/base", "runs/zib/sr", "runs/zib/cascade") == 0
    made, old = Cascade.load("runs/zib/cascade"), Cascade.load("runs/quickstart/cascade")
    base, sr = (stage.tokens.vectors["<zib>"] for stage in made.stages)
    assert not torch.equal(base, sr)
    for before, after in zip(old.stages, made.stages):
        weights = after.state_dict()
        assert weights.keys() - before.state_dict().keys() == {WORD}
        assert all(torch.equal(weights[name], value) for name, value in before.state_dict().items())
    captions = ["a small red ring on a gray background", "a large blue plus on a white background"]
    assert torch.equal(made.sample(captions, seed=1).images, old.sample(captions, seed=1).images)


def test_a_run_goes_on_where_it_was(cli):
    assert cli("fit", "--config", "textual_inversion.yaml") == 0
    assert cli("fit", "--config", "textual_inversion.yaml", "--run", "runs/zib/half", "--trainer.max_steps", 2) == 0
    assert cli("fit", "--run", "runs/zib/half", "--resume", "--trainer.max_steps", 4) == 0
    whole, half = (
        torch.load(f"runs/zib/{run}/checkpoints/last.ckpt", weights_only=True)["current_model_state"]
        for run in ("base", "half")
    )
    assert half.keys() == whole.keys()
    assert half[WORD].isfinite().all()


@pytest.mark.parametrize("name", ["textual_inversion.yaml", "textual_inversion_sr.yaml"])
def test_its_head_names_the_file_and_its_word_has_the_subjects_length(name):
    head = (EXPERIMENTS / name).read_text()
    assert f"# command:  imagen-lightning fit --config experiments/finetune/{name}\n" in head
    config = yaml.safe_load(head)
    data, model = config["data"]["init_args"], config["model"]["init_args"]
    subject = Subject.of(data["subject"], data["word"])
    assert model["tokens"]["init_args"]["words"] == {data["word"]: len(str(subject).split())}


@pytest.mark.slow
def test_the_benchmark_runs(cli):
    assert cli("fit", "--config", "textual_inversion.yaml") == 0
    assert cli("tokens", "runs/zib/base", "zib.tokens.safetensors") == 0
    assert cli("cascade", "runs/quickstart/cascade", "after", "--tokens", "zib.tokens.safetensors") == 0
    script = [sys.executable, str(ROOT / "benchmarks" / "textual_inversion.py")]
    done = subprocess.run([*script, "runs/quickstart/cascade", "after", "--num", "4"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "old captions' pictures that differ: 0 of 4" in done.stdout
