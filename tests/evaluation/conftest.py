"""A tiny cascade with random weights, 8 -> 16 px."""

import pytest
import torch
from torch import nn

from imagen_lightning.cascade import Cascade
from imagen_lightning.networks import EfficientUNet, UNet
from imagen_lightning.stages import BaseStage, Sampling, SuperResolutionStage, TextSettings
from imagen_lightning.text import TinyTextEncoder

SMALL = {"dim": 8, "multipliers": [1, 2], "num_blocks": 1, "head_dim": 8, "groups": 4, "text_dim": 16}


def randomised(stage, seed):
    """Weights that make every part of the network count; as made, its last layer is zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in stage.parameters():
        nn.init.normal_(parameter, std=0.15, generator=generator)
    return stage


@pytest.fixture
def cascade():
    text = {"encoder": TinyTextEncoder(dim=16, max_tokens=32)}
    base = BaseStage(
        8,
        UNet(**SMALL, attention=[False, True]),
        text=TextSettings(**text),
        sampling=Sampling(num_steps=3, guidance=2.0),
    )
    sr = SuperResolutionStage(
        16,
        8,
        EfficientUNet(**SMALL, attention=["none", "cross"]),
        text=TextSettings(**text),
        sampling=Sampling(num_steps=2, guidance=1.0),
    )
    return Cascade([randomised(base, 1), randomised(sr, 2)])
