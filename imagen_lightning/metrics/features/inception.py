"""The Inception network of FID, KID and the Inception score, as torch-fidelity converted it from TensorFlow."""

from __future__ import annotations

import io
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imagen_lightning.errors import InputError
from imagen_lightning.metrics.features.base import FeatureExtractor
from imagen_lightning.metrics.features.weights import Published, read_weights, without_random_numbers
from imagen_lightning.torchvision_mend import mend

PUBLISHED = Published(
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
_SIZES = {"64": 64, "192": 192, "768": 768, "2048": 2048}


class InceptionFeatures(FeatureExtractor):
    """torch-fidelity's "inception-v3-compat", the features of all published FIDs.

    Pictures are resized to 299 px by TensorFlow 1's bilinear filter, which neither antialiases nor keeps pixel centres:
    as torch-fidelity does, and torchmetrics with `antialias=False`. The network is torch-fidelity's, its weights are
    not: its own loader unpickles local files and checks no download.

    Args:
        path: the weights file; default torch.hub's copy, downloaded where absent (91 MiB).
        layer: "2048" (the published one), "768", "192" or "64".
        sha256: expected of the file, where it is another than the published one.

    Raises:
        InputError: an unknown layer; at first use, weights that cannot be had or are others.
    """

    def __init__(self, path: str | Path | None = None, layer: str = "2048", sha256: str | None = None) -> None:
        if str(layer) not in _SIZES:
            raise InputError(f"Inception layer {layer!r} is unknown; use one of {', '.join(_SIZES)}")
        self.path = path
        self.layer = str(layer)
        self.expected_sha256 = sha256

    @property
    def name(self) -> str:
        return "inception-v3-compat" if self.layer == "2048" else f"inception-v3-compat-{self.layer}"

    @property
    def sha256(self) -> str:
        """Of the weights file."""
        return self._loaded[1]

    @property
    def num_features(self) -> int:
        return _SIZES[self.layer]

    @property
    def resize_filter(self) -> str:
        return "TensorFlow 1 bilinear to 299 px"

    @property
    def distance_name(self) -> str:
        """ "FID" for the published weights and layer, else "FD-" and what they are."""
        return "FID" if self._published else f"FD-{self.name}"

    @property
    def kernel_name(self) -> str:
        return "KID" if self._published else f"KD-{self.name}"

    def logits(self, features: Tensor) -> Tensor:
        """(N, 2048) features to the (N, 1008) logits of the Inception score, without the last layer's bias.

        Raises:
            InputError: features of another layer.
        """
        if features.shape[-1] != 2048 or self.layer != "2048":
            raise InputError(f"the Inception score needs the layer '2048', not {self.layer!r}")
        return features @ self._loaded[0].fc.weight.to(features.device, features.dtype).T

    def _features(self, images: Tensor) -> Tensor:
        return self._loaded[0].to(images.device)(images)[0]

    @property
    def _published(self) -> bool:
        return self.layer == "2048" and self.sha256 == PUBLISHED.sha256

    @cached_property
    def _loaded(self) -> tuple[Any, str]:
        state, sha256 = read_weights(self.path, PUBLISHED, "the Inception weights", self.expected_sha256)
        return build_inception(state, self.layer), sha256


def build_inception(state: dict[str, Tensor], layer: str) -> nn.Module:
    """torch-fidelity's network with these weights, for inference: it gives a tuple of the layer's features.

    Raises:
        InputError: weights of another network.
    """
    mend()  # torch-fidelity imports torchvision
    from torch.nn.utils.fusion import fuse_conv_bn_eval
    from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d, FeatureExtractorInceptionV3

    # The class insists on reading a file, and unpickles it: it is given what was just written here from plain tensors.
    file = io.BytesIO()
    torch.save(dict(state), file)
    file.seek(0)
    try:
        with without_random_numbers():
            network = FeatureExtractorInceptionV3("inception-v3-compat", [layer], feature_extractor_weights_path=file)
    except RuntimeError as error:
        raise InputError("the Inception weights are those of another network; give torch-fidelity's file") from error
    # A convolution and the normalisation behind it are one convolution; channels last is how CPUs and GPUs like them.
    for module in network.modules():
        if isinstance(module, BasicConv2d):
            module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
    return network.requires_grad_(False).eval().to(memory_format=torch.channels_last)
