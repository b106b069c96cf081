"""Numbers with their protocol and interval, from features, scores and counts.

Each function completes a protocol that says how the pictures were made (and their size, prompts and weights) with how
they were measured. All work on whole sets: gather over processes first (`distributed`), then every process may call.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from imagen_lightning.catalog import BOOTSTRAP, SPLITS, SUBSETS, WILSON
from imagen_lightning.errors import InputError
from imagen_lightning.metrics.confidence import bootstrap_frechet, bootstrap_mean, wilson
from imagen_lightning.metrics.features.base import FeatureExtractor
from imagen_lightning.metrics.frechet import FeatureMoments, frechet_distance
from imagen_lightning.metrics.inception_score import inception_score
from imagen_lightning.metrics.kid import kernel_distance
from imagen_lightning.metrics.precision_recall import precision_recall
from imagen_lightning.metrics.protocol import Protocol, Value
from imagen_lightning.metrics.reference import Reference


def mean_value(metric: str, numbers: Tensor, protocol: Protocol) -> Value:
    """The mean of N numbers, one a picture; a single one has no interval, nor have numbers of which one is NaN."""
    low, high = bootstrap_mean(numbers) if len(numbers) > 1 and not numbers.isnan().any() else (None, None)
    protocol = replace(protocol, metric=metric, num_samples=len(numbers))
    return Value(metric, float(numbers.double().mean()), low, high, protocol, None if low is None else BOOTSTRAP)


def share_value(metric: str, passed: Tensor, protocol: Protocol) -> Value:
    """The share of (N,) bool that is True."""
    successes = int(passed.sum())
    low, high = wilson(successes, len(passed))
    protocol = replace(protocol, metric=metric, num_samples=len(passed))
    return Value(metric, successes / len(passed), low, high, protocol, WILSON)


def frechet_value(
    extractor: FeatureExtractor, features: Tensor, reference: Reference, protocol: Protocol, *, interval: bool = True
) -> Value:
    """FID, CLIP-FID, FD-random, …, as the extractor calls it, of (N, D) features.

    Args:
        interval: whether to find one, which takes an eigendecomposition more.
    """
    distance = frechet_distance(FeatureMoments.of(features), reference.moments)
    protocol = _measured(extractor.distance_name, extractor, features, reference, protocol)
    if not interval:
        return Value(extractor.distance_name, distance, None, None, protocol)
    low, high = bootstrap_frechet(distance, features, reference.moments)
    return Value(extractor.distance_name, distance, low, high, protocol, BOOTSTRAP)


def kernel_value(extractor: FeatureExtractor, features: Tensor, reference: Reference, protocol: Protocol) -> Value:
    """KID, KD-random, …, as the extractor calls it, of (N, D) features."""
    found = kernel_distance(features, _features(reference))
    protocol = _measured(extractor.kernel_name, extractor, features, reference, protocol, found.settings)
    return Value(
        extractor.kernel_name, found.value, found.value - found.std, found.value + found.std, protocol, SUBSETS
    )


def precision_recall_values(
    extractor: FeatureExtractor, features: Tensor, reference: Reference, protocol: Protocol, num_neighbours: int = 3
) -> list[Value]:
    """Precision and recall of (N, D) features; their intervals hold the other set's manifold fixed."""
    found = precision_recall(features, _features(reference), num_neighbours=num_neighbours)
    values = []
    for metric, inside in (("precision", found.is_real), ("recall", found.is_covered)):
        value = share_value(metric, inside, protocol)
        settings = f"k={num_neighbours}"
        values.append(replace(value, protocol=_measured(metric, extractor, features, reference, protocol, settings)))
    return values


def inception_score_value(extractor: FeatureExtractor, logits: Tensor, protocol: Protocol) -> Value:
    """The Inception score of (N, classes) logits; it has no reference."""
    found = inception_score(logits)
    protocol = replace(
        protocol,
        metric="Inception score",
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        resize_filter=extractor.resize_filter,
        num_samples=len(logits),
        settings=found.settings,
    )
    return Value("Inception score", found.value, found.value - found.std, found.value + found.std, protocol, SPLITS)


def clip_score_value(extractor: FeatureExtractor, scores: Tensor, protocol: Protocol) -> Value:
    """The mean of `clip_scores`."""
    value = mean_value("CLIP score", scores, protocol)
    return replace(
        value,
        protocol=replace(
            value.protocol,
            extractor=extractor.name,
            extractor_sha256=extractor.sha256,
            resize_filter=extractor.resize_filter,
        ),
    )


def _measured(
    metric: str,
    extractor: FeatureExtractor,
    features: Tensor,
    reference: Reference,
    protocol: Protocol,
    settings: str | None = None,
) -> Protocol:
    """The protocol with all that says how features were compared with a reference.

    Raises:
        InputError: the reference was measured by another extractor.
    """
    if (reference.key.extractor_sha256, reference.key.resize_filter) != (extractor.sha256, extractor.resize_filter):
        raise InputError(f"the reference was measured by another extractor than {extractor.name!r}; measure it again")
    same = f"reference of {reference.moments.count} at {reference.key.image_size} px"
    return replace(
        protocol,
        metric=metric,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        resize_filter=extractor.resize_filter,
        num_samples=len(features),
        reference=reference.key.data,
        reference_name=reference.name,
        settings=f"{settings}, {same}" if settings else same,
    )


def _features(reference: Reference) -> Tensor:
    if reference.features is None:
        raise InputError(
            "KID, precision and recall need the reference's features; it holds sums alone: measure it again"
        )
    return reference.features
