"""What every feature extractor is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from imagen_lightning.errors import InputError


class FeatureExtractor(ABC):
    """Frozen: pictures to feature vectors.

    No module: as an attribute of a stage or callback it reaches neither a state_dict, a checkpoint nor an average of
    weights. Nothing is loaded before the first use.

    Attributes:
        name: of the network, for protocols.
        sha256: of its weights.
        num_features: D.
        resize_filter: how pictures are brought to the network's size and range, in words.
    """

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def sha256(self) -> str: ...

    @property
    @abstractmethod
    def num_features(self) -> int: ...

    @property
    @abstractmethod
    def resize_filter(self) -> str: ...

    @property
    def distance_name(self) -> str:
        """What a Fréchet distance of these features is called; "FID" for published Inception features alone."""
        return f"FD-{self.name}"

    @property
    def kernel_name(self) -> str:
        """What a kernel distance of these features is called."""
        return f"KD-{self.name}"

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 to (B, D) float32 on the same device, without gradients and in full float32.

        Raises:
            InputError: images of another dtype or shape, weights that cannot be had.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise InputError(f"features need uint8 images (B, 3, H, W), not {images.dtype} {tuple(images.shape)}")
        if not len(images):
            return torch.zeros(0, self.num_features, device=images.device)
        with torch.no_grad(), exact_float32(images.device):
            return self._features(images)

    @abstractmethod
    def _features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, B at least 1, to (B, D) float32."""


def extract(extractor: FeatureExtractor, images: Tensor, batch_size: int = 64) -> Tensor:
    """(N, D) float32 features of (N, 3, H, W) uint8 images, `batch_size` at once, on the images' device."""
    if not len(images):
        return extractor(images)
    return torch.cat([extractor(part) for part in images.split(batch_size)])


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32: a value does not depend on the precision that the model around it runs in."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        cudnn, matmul = getattr(torch.backends.cudnn, "conv", None), torch.backends.cuda.matmul
        if cudnn is None:  # torch before 2.9
            before = torch.backends.cudnn.allow_tf32, matmul.allow_tf32
            torch.backends.cudnn.allow_tf32 = matmul.allow_tf32 = False
            try:
                yield
            finally:
                torch.backends.cudnn.allow_tf32, matmul.allow_tf32 = before
        else:
            precisions = cudnn.fp32_precision, matmul.fp32_precision
            cudnn.fp32_precision = matmul.fp32_precision = "ieee"
            try:
                yield
            finally:
                cudnn.fp32_precision, matmul.fp32_precision = precisions
