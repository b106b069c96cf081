"""experiments/domain/flowers: each file starts from the emoji cascade's stage, and its stages chain."""

import re
import sys
from contextlib import ExitStack
from pathlib import Path

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

# isort: split
import pytest
import torch
import yaml

from imagen_lightning.cascade import Cascade
from imagen_lightning.cli import fit
from imagen_lightning.types import Batch

DOMAIN = Path(__file__).parents[2] / "experiments" / "domain"
NAMES = sorted(path.name for path in (DOMAIN / "flowers").glob("*.yaml"))
CASCADES = {
    "runs/emoji/cascade": ("emoji/base_64.yaml", "emoji/sr_256.yaml"),
    "runs/emoji_32/cascade": ("emoji/small_32.yaml",),
}
NARROW = {"dim": 16, "groups": 8, "head_dim": 16}


class Parts(fit.StageCLI):
    """`fit` up to where the trainer is made."""

    def instantiate_trainer(self, **_):
        return None

    def _run_subcommand(self, _):
        pass


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Stage, data and configuration of a file, beside cascades of the emoji experiments with narrower networks."""
    monkeypatch.chdir(tmp_path)

    def parts(name, *given):
        given = fit.prepare("fit", ["--config", str(DOMAIN / name), *given], ExitStack())
        monkeypatch.setattr(sys, "argv", ["imagen-lightning", "fit", *given], ExitStack())
        return Parts(
            parser_class=fit.Parser,
            save_config_callback=None,
            trainer_defaults=fit.TRAINER_DEFAULTS,
            auto_configure_optimizers=False,
            seed_everything_default=0,
        )

    for folder, names in CASCADES.items():
        narrow = [f"--model.init_args.network.init_args.{key}={value}" for key, value in NARROW.items()]
        Cascade([parts(name, *(narrow if "small" not in name else [])).model for name in names]).save(folder)
    return lambda name: parts(f"flowers/{name}")


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_the_stage_that_it_names(make, name):
    made = make(name)
    stage, data = made.model, made.datamodule
    assert data.image_size == stage.image_size == int(re.search(r"_(\d+)", name)[1])
    assert made.settings.run.startswith("runs/flowers")
    assert made.settings.trainer.max_steps > stage.optimization.warmup_steps
    trained = {key for key, value in stage.named_parameters() if value.requires_grad}
    frozen = {key for key, value in stage.named_parameters() if not value.requires_grad}
    assert trained
    if "lora" in name:
        assert all("lora" in key for key in trained)
        assert frozen
    else:
        assert not frozen
    images = torch.zeros(2, 3, stage.image_size, stage.image_size, dtype=torch.uint8)
    batch = Batch(images, ["a photo of roses"] * 2, ["a", "b"], torch.arange(2))
    loss = stage.diffusion_loss(*stage.condition(batch, 0, True), batch.positions, 0)[0].mean()
    loss.backward()
    assert all(value.grad is not None for key, value in stage.named_parameters() if key in trained)


@pytest.mark.parametrize("kind", ["", "_lora"])
def test_the_stages_chain(make, kind):
    base, sr = (make(f"{name}{kind}.yaml").model for name in ("base_64", "sr_128"))
    assert (base.image_size, sr.low_res_size, sr.image_size) == (64, 64, 128)


def test_full_and_lora_differ_in_what_is_compared_alone():
    for name in NAMES:
        if "lora" in name:
            continue
        one, other = (yaml.safe_load((DOMAIN / "flowers" / file).read_text()) for file in
                      (name, name.replace(".yaml", "_lora.yaml")))  # fmt: skip
        assert one.pop("run") != other.pop("run")
        for config in (one, other):
            config["model"]["init_args"].pop("adapter", None)
            config["model"]["init_args"]["optimization"]["optimizer"]["init_args"].pop("lr")
        assert one == other


@pytest.mark.parametrize("name", NAMES)
def test_its_head_says_what_it_takes_and_gives(name):
    lines = (DOMAIN / "flowers" / name).read_text().splitlines()
    head = "\n".join(lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))])
    said = dict(re.findall(r"^# (\w+): +(\S.*)$", head, re.MULTILINE))
    assert {"command", "data", "hardware", "duration", "result"} <= said.keys()
    assert f"experiments/domain/flowers/{name}" in said["command"]
    for key in ("duration", "result"):
        assert re.search(r"\d|not yet measured", said[key])
