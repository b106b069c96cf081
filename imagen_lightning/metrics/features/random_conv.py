"""Features without any weights to download: a fixed random convolution network."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imagen_lightning.diffusion.random import uniform
from imagen_lightning.errors import InputError
from imagen_lightning.metrics.digests import digest_tensors
from imagen_lightning.metrics.features.base import FeatureExtractor

_SIZE = 64  # px
_WIDTHS = (32, 64, 128)
_STREAM = 1 << 21  # of the random numbers, apart from those of training, sampling and the variational bound


class RandomConvFeatures(FeatureExtractor):
    """Means over the picture of three random convolution layers, for work offline.

    Random features tell distributions of pictures apart, but not as people do: the Fréchet distance of these is called
    "FD-random", and never to be read as, or compared with, an FID. The weights are a function of the seed alone, the
    same to the bit on every machine.

    Args:
        seed: of the weights; another seed is another extractor.

    Raises:
        InputError: a negative seed.
    """

    def __init__(self, seed: int = 0) -> None:
        if seed < 0:
            raise InputError(f"RandomConvFeatures needs a seed of at least 0, not {seed}")
        self.seed = seed

    @property
    def name(self) -> str:
        return f"random-conv-{self.seed}"

    @cached_property
    def sha256(self) -> str:
        return digest_tensors(tensor for layer in self._layers for tensor in layer)

    @property
    def num_features(self) -> int:
        return sum(_WIDTHS)

    @property
    def resize_filter(self) -> str:
        return f"antialiased bilinear to {_SIZE} px"

    @property
    def distance_name(self) -> str:
        return "FD-random"

    @property
    def kernel_name(self) -> str:
        return "KD-random"

    def _features(self, images: Tensor) -> Tensor:
        x = images.float() / 127.5 - 1.0
        if x.shape[-2:] != (_SIZE, _SIZE):
            x = F.interpolate(x, size=(_SIZE, _SIZE), mode="bilinear", align_corners=False, antialias=True)
        means = []
        for weight, bias in self._layers:
            x = F.relu(F.conv2d(x, weight.to(x.device), bias.to(x.device), padding=1))
            means.append(x.mean(dim=(2, 3)))
            x = F.avg_pool2d(x, 2)
        return torch.cat(means, dim=1)

    @cached_property
    def _layers(self) -> list[tuple[Any, Any]]:
        """Weights (out, in, 3, 3) and biases (out,), uniform with He's variance: from bits by exact steps alone."""
        layers = []
        for k, (inputs, outputs) in enumerate(zip((3, *_WIDTHS), _WIDTHS)):
            rows = uniform(self.seed, _STREAM + k, torch.arange(outputs), (inputs * 9 + 1,))
            centred = 2 * rows - 1  # of variance 1/3
            scale = math.sqrt(6 / (inputs * 9))
            layers.append(((centred[:, :-1] * scale).reshape(outputs, inputs, 3, 3), centred[:, -1] * 0.5))
        return layers
