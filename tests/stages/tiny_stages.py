"""Stages small enough to run in milliseconds, with batches made of their positions."""

import imagen_lightning.torchvision_mend  # noqa: F401  isort: skip

import torch

from imagen_lightning.networks import EfficientUNet, UNet
from imagen_lightning.stages import BaseStage, SuperResolutionStage, TextSettings
from imagen_lightning.text import TinyTextEncoder
from imagen_lightning.types import Batch

SIZE, TEXT_DIM = 8, 12
CAPTIONS = ["a red star", "a large blue circle above a square", "", "a dog", "two cats on a green mat", "rain"]
SMALL = {"dim": 8, "multipliers": [1, 2], "num_blocks": 1, "head_dim": 8, "groups": 4}


def text_settings(**changes):
    return TextSettings(**{"encoder": TinyTextEncoder(TEXT_DIM, max_tokens=16), "drop": 0.0, **changes})


def base_stage(network=None, text=None, randomized=True, **changes):
    torch.manual_seed(0)
    network = network or UNet(**SMALL, attention=[False, True], text_dim=TEXT_DIM)
    return ready(BaseStage(SIZE, network, text or text_settings(), **changes), randomized)


def sr_stage(network=None, text=None, randomized=True, image_size=SIZE, low_res_size=4, **changes):
    torch.manual_seed(0)
    network = network or EfficientUNet(**SMALL, attention=["none", "self"], text_dim=TEXT_DIM)
    return ready(
        SuperResolutionStage(image_size, low_res_size, network, text or text_settings(), **changes), randomized
    )


def ready(stage, randomized):
    """Randomizes layers that begin at zero, which would answer zero to everything, and logs nowhere."""
    generator = torch.Generator().manual_seed(1)
    for parameter in stage.parameters():
        if randomized and parameter.abs().max() == 0:
            parameter.data.normal_(0, 0.2, generator=generator)
    stage.log = lambda *args, **kwargs: None
    return stage


def make_batch(positions, size=SIZE):
    positions = list(positions)
    images = [torch.randint(256, (3, size, size), generator=torch.Generator().manual_seed(p)) for p in positions]
    return Batch(
        images=torch.stack(images).to(torch.uint8),
        captions=[CAPTIONS[p % len(CAPTIONS)] for p in positions],
        keys=[f"key {p}" for p in positions],
        positions=torch.tensor(positions),
    )


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def watch(stage):
    """Lists what the network is given from now on: (x_t, t, conditioning) a call."""
    calls, predict = [], stage.predict

    def watched(x_t, t, conditioning):
        calls.append((x_t.clone(), t, conditioning))
        return predict(x_t, t, conditioning)

    stage.predict = watched
    return calls
