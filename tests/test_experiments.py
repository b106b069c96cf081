"""Every shipped experiment parses, makes its parts, and says what it takes and gives."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from imagen_lightning.cli import fit
from imagen_lightning.components import describe
from imagen_lightning.stages import DiffusionMixin
from imagen_lightning.types import Conditioning, Text

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
NAMES = sorted(str(path.relative_to(EXPERIMENTS)) for path in EXPERIMENTS.rglob("*.yaml"))
CHAINS = [("quickstart/base.yaml", "quickstart/sr.yaml"), ("domain/emoji/base_64.yaml", "domain/emoji/sr_256.yaml")]


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

    def parts(name):
        monkeypatch.setattr(sys, "argv", ["imagen-lightning", "fit", *fit.prepare("fit", ["--config", str(name)])])
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
