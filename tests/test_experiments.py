"""Every shipped experiment parses, makes its parts, and says what it takes and gives."""

import re
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from imagen_lightning.cli import fit
from imagen_lightning.cli.fit_arguments import prepare
from imagen_lightning.components import build, describe
from imagen_lightning.stages import BaseStage, DiffusionMixin
from imagen_lightning.text import T5TextEncoder
from imagen_lightning.types import Batch, Conditioning, Text

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
NAMES = sorted(
    str(path.relative_to(EXPERIMENTS))
    for path in EXPERIMENTS.rglob("*.yaml")
    # tests of sweeps, finetuning and export look at these
    if path.parent.name not in ("overlays", "sweeps", "finetune", "deepfloyd", "flowers")
)
CHAINS = [
    ("quickstart/base.yaml", "quickstart/sr.yaml"),
    ("domain/emoji/base_64.yaml", "domain/emoji/sr_256.yaml"),
    ("paper/base_64.yaml", "paper/sr_256.yaml"),
    ("paper/sr_256.yaml", "paper/sr_1024.yaml"),
]
PAPER = {"paper/base_64.yaml": "2B", "paper/sr_256.yaml": "600M", "paper/sr_1024.yaml": "400M"}
T5_DIMS = {"google/t5-v1_1-xxl": 4096}


class Parts(fit.StageCLI):
    """`fit` up to where the trainer is made."""

    def instantiate_trainer(self, **_):
        return None

    def _run_subcommand(self, _):
        pass


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Stage, data and configuration of an experiment or file; the stage's tensors have no memory."""
    monkeypatch.chdir(tmp_path)
    # The width of a published encoder, without asking the hub for its config.json.
    monkeypatch.setattr(T5TextEncoder, "dim", property(lambda encoder: T5_DIMS[encoder.name_or_path]))

    def parts(name):
        arguments = prepare("fit", ["--config", str(name)], ExitStack())
        monkeypatch.setattr(sys, "argv", ["imagen-lightning", "fit", *arguments])
        with torch.device("meta"):
            return Parts(
                parser_class=fit.Parser,
                save_config_callback=None,
                trainer_defaults=fit.TRAINER_DEFAULTS,
                auto_configure_optimizers=False,
                seed_everything_default=0,
            )

    return parts


@pytest.mark.parametrize("name", NAMES)
def test_it_makes_its_parts(make, name, tmp_path):
    made = make(name)
    stage, data = made.model, made.datamodule
    assert isinstance(stage, DiffusionMixin)
    assert data.image_size == stage.image_size
    assert made.settings.run.startswith("runs/")
    assert made.settings.trainer.max_steps > stage.optimization.warmup_steps
    describe(stage.hyperparameters())

    dim, low_size = stage.text.dim, getattr(stage, "low_res_size", None)
    with torch.device("meta"):
        images, zero = torch.zeros(1, 3, stage.image_size, stage.image_size), torch.zeros(1)
        text = Text(torch.zeros(1, 4, dim), None, torch.zeros(1, dim)) if dim else None
        conditioning = Conditioning(text, images if low_size else None, zero if low_size else None)
        assert stage.predict(images, zero, conditioning).shape == images.shape

    (tmp_path / "printed.yaml").write_text(made.dump())
    assert yaml.safe_load(make("printed.yaml").dump()) == yaml.safe_load(made.dump())


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_stages_have_the_sizes_that_their_heads_say(make, name):
    stage = make(name).model
    network, dim = stage.network, stage.text.dim
    count = sum(parameter.numel() for parameter in network.parameters())

    def flops(size):
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            images, zero = torch.zeros(1, 3, size, size), torch.zeros(1)
            text = Text(torch.zeros(1, 128, dim), None, torch.zeros(1, dim))
            network(images, zero, Conditioning(text, *((images, zero) if network.low_res else ())))
        return counter.get_total_flops()

    found = f"{count / 1e9:.3f}B parameters, {flops(stage.image_size) / 1e12:.3f} TFLOPs a forward pass of one image"
    crop = getattr(stage, "crop_size", None)
    if crop is not None:
        found += f", {flops(crop) / 1e12:.3f} of one crop in training"
    print(f"{name}: {found}")
    head = (EXPERIMENTS / name).read_text()
    assert f"# size:     {found}\n" in head
    assert f"# paper:    {PAPER[name]} parameters." in head


def test_why_the_papers_sizes_differ(make):
    base = make("paper/base_64.yaml").model.network
    resampling = [block for block in [*base.down_blocks, *base.up_blocks] if block.resample != "none"]
    joins = sum(parameter.numel() for block in resampling for parameter in block.parameters())
    assert f"{joins / 1e9:.3f}B;" in (EXPERIMENTS / "paper/base_64.yaml").read_text()
    network = make("paper/sr_256.yaml").model.network
    count = sum(parameter.numel() for parameter in network.parameters())
    for level in network.up_blocks:
        first, *others = (sum(p.numel() for p in block.parameters()) for block in level)
        count += sum(first - other for other in others)
    assert f"would make {count / 1e9:.3f}B." in (EXPERIMENTS / "paper/sr_256.yaml").read_text()


def test_a_transformer_takes_the_unets_place_by_yaml_alone(make, tmp_path):
    config = yaml.safe_load((EXPERIMENTS / "quickstart/base.yaml").read_text())
    settings = {"dim": 16, "num_layers": 2, "patch_size": 4, "bottleneck": 8, "head_dim": 8, "text_dim": 128}
    config["model"]["init_args"]["network"] = {
        "class_path": "imagen_lightning.networks.PatchTransformer",
        "init_args": settings,
    }
    (tmp_path / "transformer.yaml").write_text(yaml.safe_dump(config))
    described = make("transformer.yaml").model.hyperparameters()
    stage = BaseStage(**{name: build(value) for name, value in described.items()})  # with memory
    images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = Batch(images, ["a red star", "a dog", "", "a blue star"], list("abcd"), torch.arange(4))
    optimizer, losses = torch.optim.Adam(stage.parameters(), lr=3e-3), []
    for _ in range(30):
        losses.append(stage.diffusion_loss(*stage.condition(batch, 0, True), batch.positions, 0)[0].mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    samples = stage.sample(["a red star"], [torch.Generator().manual_seed(0)], num_steps=3)
    assert samples.shape == (1, 3, 16, 16)
    assert samples.isfinite().all()


@pytest.mark.parametrize("chain", CHAINS)
def test_the_stages_chain(make, chain):
    before, after = (make(name).model for name in chain)
    assert after.low_res_size == before.image_size
    assert type(after.text.encoder) is type(before.text.encoder)


@pytest.mark.parametrize("name", NAMES)
def test_its_head_says_what_it_takes_and_gives(name):
    lines = (EXPERIMENTS / name).read_text().splitlines()
    head = lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]
    said = dict(re.findall(r"^# (\w+): +(\S.*)$", "\n".join(head), re.MULTILINE))
    assert {"command", "hardware", "duration", "result"} <= said.keys()
    assert f"experiments/{name}" in said["command"]
    for key in ("duration", "result"):
        assert re.search(r"\d|not yet measured", said[key])
