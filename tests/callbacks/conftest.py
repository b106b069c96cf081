"""A tiny stage, its data and its trainer."""

import csv
import io
import json
import tarfile

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from imagen_lightning.data import shapes
from imagen_lightning.data.datamodule import ShapesDataModule
from imagen_lightning.images import to_pil
from imagen_lightning.networks import EfficientUNet, UNet
from imagen_lightning.stages import BaseStage, Optimization, Sampling, SuperResolutionStage, TextSettings
from imagen_lightning.text import TinyTextEncoder


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def base_stage(**network):
    seed_everything(1, verbose=False)
    settings = {"dim": 8, "multipliers": (1, 2), "num_blocks": 1, "attention": (False, True), "text_dim": 16}
    return BaseStage(
        8,
        UNet(**{**settings, "groups": 4, "head_dim": 8, **network}),
        text=TextSettings(encoder=TinyTextEncoder(16)),
        sampling=Sampling(num_steps=2),
        optimization=Optimization(optimizer=adam),
    )


def sr_stage():
    seed_everything(1, verbose=False)
    network = EfficientUNet(
        dim=8, multipliers=(1, 2), num_blocks=1, attention=("none", "self"), text_dim=16, groups=4, head_dim=8
    )
    return SuperResolutionStage(
        8,
        4,
        network,
        text=TextSettings(encoder=TinyTextEncoder(16)),
        sampling=Sampling(num_steps=2, guidance=1.0),
        optimization=Optimization(optimizer=adam),
    )


def data(**settings):
    return ShapesDataModule(**{"image_size": 8, "batch_size": 4, "num_val": 6, **settings})


def trainer(folder, callbacks, steps=4, **settings):
    return Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": steps,
            "logger": False,
            "limit_val_batches": 0,
            "enable_checkpointing": any("Checkpoint" in type(callback).__name__ for callback in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "default_root_dir": folder,
            "callbacks": callbacks,
            **settings,
        }
    )


@pytest.fixture
def fit(tmp_path):
    """`fit(callbacks, steps=4, stage=None, datamodule=None, resume=None, **trainer settings)`: trains, gives both."""

    def run(callbacks, steps=4, stage=None, datamodule=None, resume=None, folder=tmp_path, **settings):
        stage = stage or base_stage()
        made = trainer(folder, callbacks, steps, **settings)
        made.fit(stage, datamodule=datamodule or data(), ckpt_path=resume, weights_only=True)
        return stage, made

    return run


@pytest.fixture
def make_base():
    return base_stage


@pytest.fixture
def make_sr():
    return sr_stage


@pytest.fixture
def make_data():
    return data


def write_shards(path, numbers, broken=(), caption=None):
    """A shard of the built-in shapes of the given numbers, of which some have an image that cannot be decoded."""
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            image, said = shapes.sample(3, number, "val")
            buffer = io.BytesIO()
            to_pil(image).save(buffer, "PNG")
            data = b"broken" if number in broken else buffer.getvalue()
            for suffix, content in (("png", data), ("txt", (caption or said).encode())):
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.fixture
def make_shards():
    return write_shards


def rows_of(folder):
    """metrics.csv as {step: {column: number}}."""
    with (folder / "metrics.csv").open(newline="") as file:
        return {int(row.pop("step")): {k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)}


def values_of(folder):
    """values.jsonl as its entries."""
    return [json.loads(line) for line in (folder / "values.jsonl").read_text().splitlines()]


@pytest.fixture
def read_rows():
    return rows_of


@pytest.fixture
def read_values():
    return values_of
