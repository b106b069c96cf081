"""What is measured of drawn images, each number with its protocol; kept on disk beside the images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagen_lightning.errors import InputError
from imagen_lightning.evaluation.drawing import Chain, Drawing
from imagen_lightning.files import write_json
from imagen_lightning.images import downsample, to_float, to_uint8
from imagen_lightning.metrics.caption_accuracy import caption_accuracy
from imagen_lightning.metrics.clip_score import clip_scores
from imagen_lightning.metrics.confidence import bootstrap_frechet, bootstrap_mean, wilson
from imagen_lightning.metrics.digests import digest_texts
from imagen_lightning.metrics.features import ClipFeatures, FeatureExtractor, extract
from imagen_lightning.metrics.frechet import FeatureMoments, frechet_distance
from imagen_lightning.metrics.image_quality import psnr, ssim
from imagen_lightning.metrics.kid import kernel_distance
from imagen_lightning.metrics.protocol import Protocol, Value

MIN_SUBSET = 25  # kernel distances of smaller subsets say nothing
_SMALLEST_SSIM = 6  # px
CAPTION_ACCURACY = "caption accuracy"
CLIP_SCORE = "CLIP score"


@dataclass(frozen=True)
class Measured:
    """Numbers of one set of images.

    Attributes:
        values: each with its protocol.
        per_image: (N,) float64 by metric, for those metrics that are means over images.
    """

    values: tuple[Value, ...]
    per_image: dict[str, Tensor] = field(default_factory=dict)

    def has(self, metric: str) -> bool:
        return any(value.metric == metric for value in self.values)

    def value(self, metric: str) -> Value:
        return next(value for value in self.values if value.metric == metric)

    def number(self, metric: str) -> float:
        return self.value(metric).value

    def part(self, rows: Sequence[int], captions: Sequence[str]) -> list[Value]:
        """The metrics that are means over images, of some of the images alone."""
        found = []
        for metric, numbers in self.per_image.items():
            own = numbers[list(rows)]
            kept = replace(self.value(metric).protocol, num_samples=len(own), prompts=digest_texts(captions))
            if metric == CAPTION_ACCURACY:
                low, high = wilson(round(float(own.sum())), len(own))
                found.append(Value(metric, float(own.mean()), low, high, kept, "95% Wilson"))
            elif len(own) > 1:
                found.append(_mean(metric, own, kept))
            else:
                found.append(Value(metric, float(own.mean()), None, None, kept))
        return found

    def margin(self, metric: str) -> float | None:
        """Half the width of the metric's interval."""
        value = self.value(metric)
        return None if value.low is None or value.high is None else (value.high - value.low) / 2


@dataclass(frozen=True)
class Judge:
    """A metric by which stages are judged."""

    metric: str
    higher_is_better: bool
    percent: bool


class Measurer:
    """Measures chains; a chain that was measured with the same extractors is read from `folder`.

    Args:
        folder: for one JSON file a chain.
        extractors: feature extractors, each of which gives a Fréchet distance and a kernel distance.
        clip: a CLIP model for the CLIP score, or None.
        batch_size: of the extractors.
    """

    def __init__(
        self,
        folder: Path,
        extractors: Sequence[FeatureExtractor] = (),
        clip: ClipFeatures | None = None,
        batch_size: int = 64,
    ) -> None:
        self.folder = folder
        self.extractors = list(extractors)
        self.clip = clip
        self.batch_size = batch_size
        self._reference: dict[tuple[str, int], Tensor] = {}

    def judges(self, order: Sequence[Measured]) -> list[Judge]:
        """The metrics that all of `order` have and that can judge, the one closest to what a person sees first."""
        return [judge for judge in self._known() if all(item.has(judge.metric) for item in order)]

    def _known(self) -> list[Judge]:
        return [
            Judge(CAPTION_ACCURACY, True, True),
            Judge(CLIP_SCORE, True, False),
            *(Judge(extractor.distance_name, False, False) for extractor in self.extractors),
        ]

    def judge_of(self, metric: str) -> Judge:
        """How a metric by this name judges.

        Raises:
            InputError: none of this name judges whole cascades here.
        """
        found = {judge.metric: judge for judge in self._known()}
        if metric not in found:
            raise InputError(f"metric {metric!r} cannot choose a point here; use one of {', '.join(map(repr, found))}")
        return found[metric]

    def measure(self, drawing: Drawing, chain: Chain) -> Measured:
        """Metrics of the chain's last stage at its own size."""
        path = self.folder / f"{drawing.name(chain)}.json"
        known = _read(path, self._key())
        if known is not None:
            return known
        drawn = drawing.draw(chain)
        protocol = self._protocol(drawing, drawn.images, chain)
        measured = self._measure(drawing, drawn.images, drawn.given, protocol, chain.first == chain.last)
        _write(path, self._key(), measured)
        return measured

    def measure_real(self, drawing: Drawing, size: int) -> Measured:
        """The same of the real images at a stage's size: what a perfect stage reaches."""
        images = drawing.truth(size)
        assert images is not None
        return self._measure(drawing, images, None, self._protocol(drawing, images, None), False)

    def _key(self) -> list[str]:
        named = [*self.extractors, *([self.clip] if self.clip is not None else [])]
        return [f"{extractor.name} {extractor.sha256}" for extractor in named]

    def _protocol(self, drawing: Drawing, images: Tensor, chain: Chain | None) -> Protocol:
        # Real images bear the weights' and precision's names too: they are measured as the stages' images are.
        made: dict[str, Any] = {"precision": drawing.precision, "weights": "ema"}
        if chain is not None:
            for name in ("guidance", "steps", "aug_level"):
                made[name] = [getattr(setting, name) for setting in chain.settings]
            made["sampler"] = [type(setting.sampler).__name__ for setting in chain.settings]
            made["seed"] = drawing.seed
        return Protocol(
            "none",
            image_size=images.shape[-1],
            num_samples=len(images),
            prompts=digest_texts(drawing.data.captions),
            **made,
        )

    def _measure(
        self, drawing: Drawing, images: Tensor, given: Tensor | None, protocol: Protocol, on_real_input: bool
    ) -> Measured:
        values: list[Value] = []
        per_image: dict[str, Tensor] = {}
        captions = drawing.data.captions
        if drawing.data.has_answers:
            accuracy = caption_accuracy(images, captions)
            per_image[CAPTION_ACCURACY] = accuracy.all.double()
            for name, share in accuracy.mean().items():
                metric = CAPTION_ACCURACY if name == "all" else f"{CAPTION_ACCURACY}, {name}"
                count = int(accuracy.has_relation.sum()) if name == "relation" else len(images)
                low, high = wilson(round(share * count), count)
                values.append(Value(metric, share, low, high, replace(protocol, metric=metric), "95% Wilson"))
        if self.clip is not None:
            scores = clip_scores(self.clip, images, captions, self.batch_size)
            per_image[CLIP_SCORE] = scores
            values.append(_mean(CLIP_SCORE, scores, _by(protocol, self.clip)))
        truth = drawing.truth(images.shape[-1])
        if truth is not None:
            compared = replace(protocol, reference=drawing.data.sha256, reference_name=drawing.data.name)
            for extractor in self.extractors:
                values += self._distances(extractor, images, truth, _by(compared, extractor))
            if on_real_input and given is not None:
                values += _nearness(images, truth, compared)
        if given is not None:
            values += _faithfulness(images, given, protocol)
        return Measured(tuple(values), per_image)

    def _distances(self, extractor: FeatureExtractor, images: Tensor, truth: Tensor, protocol: Protocol) -> list[Value]:
        features, reference = self._features(extractor, images), self._reference_features(extractor, truth)
        moments = FeatureMoments.of(reference)
        distance = frechet_distance(FeatureMoments.of(features), moments)
        low, high = bootstrap_frechet(distance, features, moments)
        name, kernel_name = extractor.distance_name, extractor.kernel_name
        values = [Value(name, distance, low, high, replace(protocol, metric=name), "95% bootstrap")]
        if len(images) >= 2 * MIN_SUBSET:
            kernel = kernel_distance(features, reference)
            named = replace(protocol, metric=kernel_name, settings=kernel.settings)
            spread = (kernel.value - kernel.std, kernel.value + kernel.std)
            values.append(Value(kernel_name, kernel.value, *spread, named, "1 std of the subsets"))
        return values

    def _features(self, extractor: FeatureExtractor, images: Tensor) -> Tensor:
        return extract(extractor, images, self.batch_size)

    def _reference_features(self, extractor: FeatureExtractor, truth: Tensor) -> Tensor:
        key = extractor.name, truth.shape[-1]
        if key not in self._reference:
            self._reference[key] = self._features(extractor, truth)
        return self._reference[key]


def _by(protocol: Protocol, extractor: FeatureExtractor) -> Protocol:
    return replace(
        protocol,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        resize_filter=extractor.resize_filter,
    )


def _mean(metric: str, numbers: Tensor, protocol: Protocol) -> Value:
    low, high = bootstrap_mean(numbers)
    named = replace(protocol, metric=metric)
    return Value(metric, numbers.double().mean().item(), low, high, named, "95% bootstrap")


def _nearness(images: Tensor, truth: Tensor, protocol: Protocol) -> list[Value]:
    """How near super-resolved real images are to the real ones."""
    values = [_mean("PSNR", psnr(images, truth), protocol)]
    if images.shape[-1] >= _SMALLEST_SSIM:
        values.append(_mean("SSIM", ssim(images, truth), protocol))
    return values


def _faithfulness(images: Tensor, given: Tensor, protocol: Protocol) -> list[Value]:
    """How well a super-resolution stage keeps what it is given: its output, reduced again, against its input."""
    reduced = to_uint8(downsample(to_float(images), given.shape[-1]))
    shift = (reduced.double().mean((-2, -1)) - given.double().mean((-2, -1))).abs().mean(1)
    return [_mean("low-res PSNR", psnr(reduced, given), protocol), _mean("colour shift", shift, protocol)]


def _read(path: Path, key: Sequence[str]) -> Measured | None:
    """What was measured with the same extractors, or None."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None  # measured again
    if content.get("measured_by") != list(key):
        return None
    per_image = {name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in content["per_image"].items()}
    return Measured(tuple(Value.from_json(value) for value in content["values"]), per_image)


def _write(path: Path, key: Sequence[str], measured: Measured) -> None:
    content = {
        "measured_by": list(key),
        "values": [value.to_json() for value in measured.values],
        "per_image": {name: numbers.tolist() for name, numbers in measured.per_image.items()},
    }
    write_json(path, content)
