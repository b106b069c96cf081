"""Bad values for every key of `fit`'s configuration: one line and exit code 2, and nothing left behind."""

import inspect
import math
import random
import shutil
from pathlib import Path

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

# isort: split
import pytest
import yaml
from lightning.pytorch import Trainer
from tiny_fit import STAGE, changed, contents

VALUES = ["x", -1, 0, math.nan, 10**30, 1e300, [], {}, [-1], "\u2028é", "/no/such", True, None, 0.5, [math.nan]]
MEANT = ("trainer.devices", "trainer.num_nodes", "trainer.max_steps", "trainer.max_epochs", "trainer.min_", "run")
FEW, MANY = 40, 400


def flat(config, key=""):
    """Keys of a nested configuration, those of sections too."""
    for name, item in config.items():
        inner = f"{key}.{name}" if key else name
        yield inner
        if isinstance(item, dict):
            yield from flat(item, inner)


def keys():
    """Every key that a configuration of the tiny stage may have."""
    named = [f"trainer.{name}" for name in inspect.signature(Trainer).parameters if name != "default_root_dir"]
    network = "model.init_args.network.init_args"
    named += [f"{network}.{name}" for name in ("text_dim", "patch_size", "channels", "out_channels", "time_dim", "eps")]
    optimization = "model.init_args.optimization"
    named += [f"{optimization}.{name}" for name in ("warmup_steps", "lr_schedule", "train", "freeze", "lr_scales")]
    named += [f"{optimization}.optimizer.init_args.{name}" for name in ("lr", "betas", "eps", "weight_decay")]
    named += [f"data.init_args.{name}" for name in ("seed", "num_workers", "num_val")]
    named += [f"ema.{name}" for name in ("decay", "device")] + [
        f"checkpoint.{name}" for name in ("every_n_steps", "keep")
    ]
    named += ["model.init_args.seed", "seed_everything", "ckpt_path", "init_from", "on_change", "wandb_project"]
    return [key for key in sorted({*flat(STAGE), *named}) if not key.startswith(MEANT)]


def cases(number):
    pairs = [(key, value) for key in keys() for value in VALUES]
    return random.Random(1).sample(pairs, number)


def check(cli, capsys, key, value):
    Path("bad.yaml").write_text(yaml.safe_dump(changed(**{key.replace(".", "/"): value})))
    before = contents(".")
    capsys.readouterr()
    code = cli("fit", "--config", "bad.yaml", "--run", "run", "--trainer.enable_progress_bar", "false")
    shown = capsys.readouterr().err
    if code == 0:
        shutil.rmtree("run", ignore_errors=True)
        return
    assert code == 2
    (line,) = [line for line in shown.splitlines() if line.startswith("imagen-lightning: error: ")]
    assert len(line) < 1500
    assert contents(".") == before


def test_bad_values_are_one_line(cli, capsys, monkeypatch):
    monkeypatch.setattr(Trainer, "_fit_impl", lambda *_, **__: None)
    for key, value in cases(FEW):
        print(f"{key}: {value!r}")  # for the report of a failure
        check(cli, capsys, key, value)


@pytest.mark.slow
@pytest.mark.parametrize(("key", "value"), cases(MANY), ids=str)
def test_bad_values_are_one_line_in_training_too(cli, capsys, key, value):
    check(cli, capsys, key, value)
