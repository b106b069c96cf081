"""FID and KID of what a stage draws, or the same distances of other features under their own names."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any

from torch import Tensor

from imagen_lightning.callbacks.drawing import Pictures
from imagen_lightning.callbacks.sampled_metric import SampledMetric, reference_of
from imagen_lightning.metrics.confidence import bootstrap_frechet
from imagen_lightning.metrics.distributed import gather_by_position
from imagen_lightning.metrics.features import FeatureExtractor, RandomConvFeatures, extract
from imagen_lightning.metrics.frechet import FeatureMoments, frechet_distance
from imagen_lightning.metrics.kid import kernel_distance
from imagen_lightning.metrics.protocol import Protocol, Value


class FeatureDistance(SampledMetric):
    """A distance of the drawn images' features from the validation images'.

    Args:
        extractor: whose features; by default fixed random ones, which need no download, and whose distances are never
            called FID. `imagen_lightning.metrics.features.InceptionFeatures` gives FID and KID. Its weights stay out of
            checkpoints.
        **options: see SampledMetric.
    """

    needs_reference = True

    def __init__(self, extractor: FeatureExtractor | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.extractor = extractor or RandomConvFeatures()
        self._reference: tuple[str, Tensor] | None = None

    @abstractmethod
    def distance(self, features: Tensor, reference: Tensor, protocol: Protocol) -> Value:
        """Of (N, D) features of all processes from (M, D) reference features."""

    def measure(self, images: Tensor, positions: Tensor, given: Pictures, protocol: Protocol) -> list[Value]:
        assert given.truth is not None
        digest = reference_of(given)
        if self._reference is None or self._reference[0] != digest:
            part = given.truth[positions]
            self._reference = digest, gather_by_position(extract(self.extractor, part), positions)
        features = gather_by_position(extract(self.extractor, images), positions)
        by = replace(
            protocol,
            extractor=self.extractor.name,
            extractor_sha256=self.extractor.sha256,
            resize_filter=self.extractor.resize_filter,
            reference=digest,
            reference_name="validation images",
        )
        return [self.distance(features, self._reference[1], by)]


class FID(FeatureDistance):
    """Fréchet distance (Heusel et al. 2017, eq. 6) with a bootstrap interval; see FeatureDistance.

    Few images measure the number of images as much as their quality: compare runs with one `num_samples` only.
    """

    def distance(self, features: Tensor, reference: Tensor, protocol: Protocol) -> Value:
        moments = FeatureMoments.of(reference)
        value = frechet_distance(FeatureMoments.of(features), moments)
        low, high = bootstrap_frechet(value, features, moments)
        name = self.extractor.distance_name
        return Value(name, value, low, high, replace(protocol, metric=name), "95% bootstrap")


class KID(FeatureDistance):
    """Kernel distance (Binkowski et al. 2018), unbiased also for few images, with the spread over its subsets."""

    least = 4

    def distance(self, features: Tensor, reference: Tensor, protocol: Protocol) -> Value:
        kernel = kernel_distance(features, reference)
        name = self.extractor.kernel_name
        named = replace(protocol, metric=name, settings=kernel.settings)
        low, high = kernel.value - kernel.std, kernel.value + kernel.std
        return Value(name, kernel.value, low, high, named, "1 std of the subsets")
