"""Small stages to plan."""

from functools import partial

import pytest
import torch

from imagen_lightning.cascade.description import without_weights
from imagen_lightning.networks import EfficientUNet, PatchTransformer, UNet
from imagen_lightning.planning import Training, find_precision
from imagen_lightning.stages import BaseStage, Optimization, SuperResolutionStage, TextSettings
from imagen_lightning.text import TinyTextEncoder

ADAMW = partial(torch.optim.AdamW, foreach=False)
NETWORKS = {
    "unet": (UNet, {"dim": 32, "multipliers": [1, 2], "num_blocks": 1, "attention": [False, True], "groups": 8}),
    "patches": (PatchTransformer, {"dim": 64, "num_layers": 3, "bottleneck": 32, "patch_size": 4}),
    "efficient": (EfficientUNet, {"dim": 32, "multipliers": [1, 2], "num_blocks": 1, "attention": ["none", "self"]}),
}


@pytest.fixture
def train():
    """A training of a small stage, with weights or without."""

    def make(name="unet", weights=False, precision="32-true", batch_size=8, optimizer=ADAMW, crop=None, **settings):
        cls, arguments = NETWORKS[name]
        changes = {key: settings.pop(key) for key in ("recompute", "dropout") if key in settings}
        torch.manual_seed(0)

        def stage():
            network = cls(**{"text_dim": 64, "head_dim": 16, **arguments, **changes})
            text, optimization = TextSettings(TinyTextEncoder(64)), Optimization(optimizer)
            if name == "efficient":
                return SuperResolutionStage(64, 16, network, text, optimization=optimization, crop_size=crop)
            return BaseStage(32, network, text, optimization=optimization)

        if not weights:
            with without_weights():
                made = stage()
        else:
            made = stage()
        given = {"num_tokens": 24, "device": "cpu", **settings}
        return Training(made, find_precision(precision), batch_size, **given)

    return make
