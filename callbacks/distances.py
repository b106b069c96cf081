"""FID and KID of what a stage draws, or the same distances of other features under their own names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imagen_lightning.callbacks.sampled_metric import Given, SampledMetric
from imagen_lightning.metrics.features import FeatureExtractor, RandomConvFeatures
from imagen_lightning.metrics.protocol import Protocol, Value
from imagen_lightning.metrics.reference import Reference, measure_reference
from imagen_lightning.metrics.values import frechet_value, kernel_value

_BATCH = 64  # images at once on the device


class FID(SampledMetric):
    """Fréchet distance (Heusel et al. 2017, eq. 6) of the drawn images' features from the real ones', with an interval.

    Few images measure the number of images as much as their quality: compare runs with one `num_samples` only.

    Args:
        extractor: whose features; by default fixed random ones, which need no download, and whose distance is called
            FD-random. `imagen_lightning.metrics.features.InceptionFeatures` gives FID, `ClipFeatures` CLIP-FID. Its
            weights stay out of checkpoints.
        **options: see SampledMetric.
    """

    needs_reference = True

    def __init__(self, extractor: FeatureExtractor | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.extractor = extractor or RandomConvFeatures()
        self._reference: Reference | None = None

    @property
    def metric(self) -> str:
        return self.extractor.distance_name

    def prepare(self, given: Given) -> None:
        self._reference = _reference(self.extractor, given)

    def look(self, images: Tensor, given: Given) -> Tensor:
        return _features(self.extractor, images, given)

    def value(self, found: Tensor, protocol: Protocol) -> Value:
        assert self._reference is not None
        return frechet_value(self.extractor, found, self._reference, protocol)


class KID(SampledMetric):
    """Kernel distance (Binkowski et al. 2018), unbiased also for few images, with the spread over its subsets.

    Args:
        extractor: see FID; by default the distance is called KD-random.
        **options: see SampledMetric.
    """

    needs_reference = True
    least = 4

    def __init__(self, extractor: FeatureExtractor | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.extractor = extractor or RandomConvFeatures()
        self._reference: Reference | None = None

    @property
    def metric(self) -> str:
        return self.extractor.kernel_name

    def prepare(self, given: Given) -> None:
        self._reference = _reference(self.extractor, given)

    def look(self, images: Tensor, given: Given) -> Tensor:
        return _features(self.extractor, images, given)

    def value(self, found: Tensor, protocol: Protocol) -> Value:
        assert self._reference is not None
        return kernel_value(self.extractor, found, self._reference, protocol)


def _reference(extractor: FeatureExtractor, given: Given) -> Reference:
    """All processes' real images, of which each measures its own."""
    truth, reference = given.own.truth, given.reference
    assert truth is not None
    assert reference is not None
    parts = zip(truth.split(_BATCH), given.positions.split(_BATCH))
    batches = ((images.to(given.device), positions) for images, positions in parts)
    return measure_reference(extractor, batches, reference, truth.shape[-1], name=given.name)


def _features(extractor: FeatureExtractor, images: Tensor, given: Given) -> Tensor:
    """(N_r, D) float32 of this process's images."""
    return torch.cat([extractor(part.to(given.device)).float().cpu() for part in images.split(_BATCH)])
