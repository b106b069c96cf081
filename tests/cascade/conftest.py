"""Two small stages whose every weight counts, and the cascade of them in a folder."""

import json

import pytest
import torch
from torch import nn

from imagen_lightning.cascade import Cascade
from imagen_lightning.networks import EfficientUNet, UNet
from imagen_lightning.stages import BaseStage, Sampling, SuperResolutionStage, TextSettings
from imagen_lightning.text import TinyTextEncoder, TransformerEncoder

SMALL = {"dim": 8, "multipliers": [1, 2], "num_blocks": 1, "head_dim": 8, "groups": 4, "text_dim": 16}


def randomised(stage, seed):
    """The stage with weights that make every part of the network count; as made, its last layer is zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in stage.parameters():
        nn.init.normal_(parameter, std=0.15, generator=generator)
    return stage.eval()


@pytest.fixture(scope="session")
def make_base():
    def make(seed=1, **arguments):
        text = TextSettings(TinyTextEncoder(dim=16, max_tokens=16))
        network = UNet(**SMALL, attention=[False, True])
        sampling = Sampling(num_steps=3, guidance=2.0)
        return randomised(BaseStage(8, network, text=text, sampling=sampling, **arguments), seed)

    return make


@pytest.fixture(scope="session")
def make_sr():
    def make(seed=2, low_res_size=8, image_size=16, **arguments):
        text = TextSettings(
            TinyTextEncoder(dim=12, max_tokens=16),
            TransformerEncoder(12, 16, num_layers=1, num_heads=2),
            null_text="learned",
        )
        network = EfficientUNet(**SMALL, attention=["none", "cross"])
        sampling = Sampling(num_steps=2, guidance=1.5)
        stage = SuperResolutionStage(image_size, low_res_size, network, text=text, sampling=sampling, **arguments)
        return randomised(stage, seed)

    return make


@pytest.fixture(scope="session")
def cascade(make_base, make_sr):
    return Cascade([make_base(), make_sr()])


@pytest.fixture
def saved(cascade, tmp_path):
    """A folder of the cascade, the test's own."""
    cascade.save(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def sharded(cascade, tmp_path):
    """The same, its weights in several files a stage."""
    cascade.save(tmp_path / "sharded", max_shard_size=10_000)
    return tmp_path / "sharded"


@pytest.fixture(scope="session")
def edit():
    """edit(folder, change) has `change` edit the manifest."""

    def edit_manifest(folder, change):
        manifest = json.loads((folder / "cascade.json").read_text())
        change(manifest)
        (folder / "cascade.json").write_text(json.dumps(manifest))

    return edit_manifest
