"""A stage that trains in a second, and what tests of `fit` do with it."""

import copy
from pathlib import Path

import torch
import yaml

STAGE = {
    "seed_everything": 1,
    "model": {
        "class_path": "imagen_lightning.stages.BaseStage",
        "init_args": {
            "image_size": 8,
            "network": {
                "class_path": "imagen_lightning.networks.UNet",
                "init_args": {
                    **{"dim": 8, "multipliers": [1], "num_blocks": 1, "attention": [True], "text_dim": 8},
                    **{"groups": 4, "head_dim": 8, "dropout": 0.1},
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
    "trainer": {"accelerator": "cpu", "max_steps": 3, "val_check_interval": 3, "log_every_n_steps": 1},
    "throughput": {"measure_matmul": False},
}


def changed(**changes):
    """STAGE with the values at paths such as "data/init_args/seed" set, or removed where the value is `...`."""
    config = copy.deepcopy(STAGE)
    for path, value in changes.items():
        *parents, last = path.split("/")
        place = config
        for key in parents:
            place = place.setdefault(key, {})
        if value is ...:
            del place[last]
        else:
            place[last] = value
    return config


def write(name, **changes):
    Path(name).write_text(yaml.safe_dump(changed(**changes)))


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def checkpoint(run):
    return torch.load(Path(run, "checkpoints", "last.ckpt"), weights_only=True)


def refusal(cli, capsys, *arguments):
    """The one line on stderr with exit code 2."""
    capsys.readouterr()
    before = contents(".")
    assert cli(*arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = [line for line in shown.err.splitlines() if line.startswith("imagen-lightning: error: ")]
    assert shown.err.endswith(f"{line}\n")
    assert contents(".") == before
    return line
