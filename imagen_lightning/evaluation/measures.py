"""What is measured of drawn images, each number with its protocol; kept on disk beside the images."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagen_lightning import catalog
from imagen_lightning.cascade.sampling import protocol_fields
from imagen_lightning.errors import InputError
from imagen_lightning.evaluation.data import EvaluationSet
from imagen_lightning.evaluation.drawing import Chain, Drawing
from imagen_lightning.evaluation.image_set import ImageSet, reduce
from imagen_lightning.files import write_json
from imagen_lightning.metrics.caption_accuracy import caption_accuracy
from imagen_lightning.metrics.clip_score import clip_scores
from imagen_lightning.metrics.digests import digest_texts
from imagen_lightning.metrics.features import ClipFeatures, FeatureExtractor, InceptionFeatures
from imagen_lightning.metrics.frechet import FeatureMoments
from imagen_lightning.metrics.image_quality import LPIPS, psnr, ssim
from imagen_lightning.metrics.probes import colour_shift
from imagen_lightning.metrics.protocol import Protocol, Value
from imagen_lightning.metrics.reference import Reference, ReferenceKey
from imagen_lightning.metrics.values import (
    clip_score_value,
    frechet_value,
    inception_score_value,
    kernel_value,
    mean_value,
    precision_recall_values,
    share_value,
)

MIN_SUBSET = 25  # kernel distances of smaller subsets say nothing, nor do neighbours among fewer than twice as many
_SMALLEST_SSIM = 6  # px
_SMALLEST_LPIPS = 32  # px
CAPTION_ACCURACY = "caption accuracy"
CLIP_SCORE = "CLIP score"
LPIPS_NAME = "LPIPS"
PSNR = "PSNR"
SSIM = "SSIM"


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
            protocol = replace(self.value(metric).protocol, prompts=digest_texts(captions))
            made = share_value if metric == CAPTION_ACCURACY else mean_value
            found.append(made(metric, own, protocol))
        return found

    def margin(self, metric: str) -> float | None:
        """Half the width of the metric's interval."""
        value = self.value(metric)
        return None if value.low is None or value.high is None else (value.high - value.low) / 2


@dataclass(frozen=True)
class Judge:
    """A metric by which stages are judged."""

    metric: str

    @property
    def higher_is_better(self) -> bool:
        return bool(catalog.higher_is_better(self.metric))

    @property
    def percent(self) -> bool:
        return catalog.is_percent(self.metric)

    def quality(self, measured: Measured) -> float:
        """The number, its sign so that more is better."""
        return (1 if self.higher_is_better else -1) * measured.number(self.metric)


class Measurer:
    """Measures chains; a chain that was measured by the same networks is read from `folder`.

    Images are read, and networks see them, a block at a time; features of all of them are held.

    Args:
        folder: for one JSON file a chain.
        extractors: feature extractors, each of which gives a Fréchet distance, and for enough images a kernel distance,
            precision and recall; Inception also its score.
        clip: a CLIP model for the CLIP score and the distances of its features, or None.
        lpips: for super-resolution stages on real input, or None.
        batch_size: images at a time.
        device: where the networks run.
    """

    def __init__(
        self,
        folder: Path,
        extractors: Sequence[FeatureExtractor] = (),
        clip: ClipFeatures | None = None,
        lpips: LPIPS | None = None,
        batch_size: int = 64,
        device: torch.device | str = "cpu",
    ) -> None:
        self.folder = folder
        self.extractors = [*extractors, *([clip] if clip is not None else [])]
        self.clip = clip
        self.lpips = lpips
        self.batch_size = batch_size
        self.device = torch.device(device)
        self._reference: dict[tuple[str, int], Reference] = {}

    def judges(self, order: Sequence[Measured]) -> list[Judge]:
        """The metrics that all of `order` have and that can judge, the one closest to what a person sees first."""
        return [judge for judge in self._known() if all(item.has(judge.metric) for item in order)]

    def _known(self) -> list[Judge]:
        return [
            Judge(CAPTION_ACCURACY),
            *([Judge(CLIP_SCORE)] if self.clip is not None else []),
            *(Judge(extractor.distance_name) for extractor in self.extractors),
        ]

    def judge_of(self, metric: str, data: EvaluationSet) -> Judge:
        """How a metric by this name judges on this data.

        Raises:
            InputError: none of this name judges whole cascades here.
        """
        found = {judge.metric: judge for judge in self._known()}
        if not data.has_answers:
            found.pop(CAPTION_ACCURACY)
        if data.images is None:
            for extractor in self.extractors:
                found.pop(extractor.distance_name, None)
        if metric not in found:
            known = f"use one of {', '.join(map(repr, found))}" if found else "give --clip for the CLIP score"
            raise InputError(f"metric {metric!r} cannot choose a point here; {known}")
        return found[metric]

    def measure(self, drawing: Drawing, chain: Chain) -> Measured:
        """Metrics of the chain's last stage at its own size."""

        def find() -> Measured:
            drawn = drawing.draw(chain)
            truth = drawing.truth(drawn.images.size)
            pairs = truth if chain.first == chain.last and drawn.given is not None else None
            protocol = self._protocol(drawing, drawn.images, chain)
            return self._measure(drawing.data, drawn.images, drawn.given, truth, pairs, protocol)

        return self._once(drawing.name(chain), find, f"weights {drawing.weights(chain)}")

    def measure_real(self, drawing: Drawing, size: int) -> Measured:
        """The same of the real images at a stage's size: what a perfect stage reaches."""

        def find() -> Measured:
            images = drawing.truth(size)
            assert images is not None
            return self._measure(drawing.data, images, None, images, None, self._protocol(drawing, images, None))

        return self._once(f"real-{size}", find)

    def _once(self, name: str, find: Callable[[], Measured], *facts: str) -> Measured:
        """What is on disk, or else is found and written there; `facts` are in its protocol and not in its name."""
        path, key = self.folder / f"{name}.json", [*self._key(), *facts]
        measured = _read(path, key)
        if measured is None:
            measured = find()
            _write(path, key, measured)
        return measured

    def _key(self) -> list[str]:
        named: list[FeatureExtractor | LPIPS] = [*self.extractors]
        if self.lpips is not None:
            named.append(self.lpips)
        return [f"{network.name} {network.sha256}" for network in named]

    def _protocol(self, drawing: Drawing, images: ImageSet, chain: Chain | None) -> Protocol:
        made: dict[str, Any] = {}
        if chain is not None:
            made = {**protocol_fields(chain.described()), "weights": drawing.weights(chain), "seed": drawing.seed}
        return Protocol(
            "none",
            image_size=images.size,
            num_samples=len(images),
            prompts=digest_texts(drawing.data.captions),
            precision=drawing.precision,  # of real images too: they are measured as the stages' images are
            **made,
        )

    def _measure(
        self,
        data: EvaluationSet,
        images: ImageSet,
        given: ImageSet | None,
        truth: ImageSet | None,
        pairs: ImageSet | None,
        protocol: Protocol,
    ) -> Measured:
        """Measures images.

        Args:
            data: their captions.
            images: what is measured.
            given: what a super-resolution stage was given to make them.
            truth: the real images, of which they should have the distribution.
            pairs: the real images, where they should be these very ones.
            protocol: how they were made.
        """
        numbers: dict[str, list[Tensor]] = defaultdict(list)
        features: dict[str, list[Tensor]] = defaultdict(list)
        answers: dict[str, list[Tensor]] = defaultdict(list)
        for rows in images.blocks(self.batch_size):
            block, captions = images[rows], data.captions[rows]
            if data.has_answers:
                accuracy = caption_accuracy(block, captions)
                answers[CAPTION_ACCURACY].append(accuracy.all)
                for name in ("background", "number", "color", "shape", "size", "relation"):
                    right = getattr(accuracy, name)
                    answers[f"{CAPTION_ACCURACY}, {name}"].append(
                        right[accuracy.has_relation] if name == "relation" else right
                    )
            seen = block.to(self.device)
            if self.clip is not None:
                numbers[CLIP_SCORE].append(clip_scores(self.clip, seen, captions, self.batch_size).cpu())
            if truth is not None:
                for extractor in self.extractors:
                    features[extractor.name].append(extractor(seen).cpu())
            if pairs is not None:
                for metric, values in self._nearness(seen, pairs[rows].to(self.device)).items():
                    numbers[metric].append(values.cpu())
            if given is not None:
                for metric, values in _faithfulness(block, given[rows]).items():
                    numbers[metric].append(values)
        shares = {metric: torch.cat(parts) for metric, parts in answers.items()}
        means = {metric: torch.cat(parts) for metric, parts in numbers.items()}
        found = [share_value(metric, passed, protocol) for metric, passed in shares.items() if len(passed)]
        for metric, each in means.items():
            if metric == CLIP_SCORE and self.clip is not None:
                found.append(clip_score_value(self.clip, each, protocol))
            else:
                found.append(mean_value(metric, each, self._of_pairs(metric, protocol, data)))
        if truth is not None:
            for extractor in self.extractors:
                reference = self._reference_of(extractor, truth, data)
                found += _distances(extractor, torch.cat(features[extractor.name]), reference, protocol)
        judged = {CAPTION_ACCURACY: shares, CLIP_SCORE: means}
        per_image = {metric: kind[metric].double() for metric, kind in judged.items() if metric in kind}
        return Measured(tuple(found), per_image)

    def _nearness(self, images: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """How near super-resolved real images are to the real ones, one number an image."""
        found = {PSNR: psnr(images, truth)}
        if images.shape[-1] >= _SMALLEST_SSIM:
            found[SSIM] = ssim(images, truth)
        if self.lpips is not None and images.shape[-1] >= _SMALLEST_LPIPS:
            found[LPIPS_NAME] = self.lpips(images, truth)
        return found

    def _of_pairs(self, metric: str, protocol: Protocol, data: EvaluationSet) -> Protocol:
        """The protocol of a mean over images, with the real images where it compares with these."""
        if metric in (PSNR, SSIM, LPIPS_NAME):
            protocol = replace(protocol, reference=data.sha256, reference_name=data.name)
        if metric == LPIPS_NAME and self.lpips is not None:
            protocol = replace(protocol, extractor=self.lpips.name, extractor_sha256=self.lpips.sha256)
        return protocol

    def _reference_of(self, extractor: FeatureExtractor, truth: ImageSet, data: EvaluationSet) -> Reference:
        """Features of the real images at a size; found once."""
        place = extractor.name, truth.size
        if place not in self._reference:
            blocks = truth.blocks(self.batch_size)
            features = torch.cat([extractor(truth[rows].to(self.device)).cpu() for rows in blocks])
            key = ReferenceKey.of(extractor, data.sha256, truth.size)
            self._reference[place] = Reference(key, FeatureMoments.of(features), features, data.name)
        return self._reference[place]


def _distances(extractor: FeatureExtractor, features: Tensor, reference: Reference, protocol: Protocol) -> list[Value]:
    """All that the features tell of the images beside the real ones."""
    found = [frechet_value(extractor, features, reference, protocol)]
    if len(features) < 2 * MIN_SUBSET:
        return found
    found.append(kernel_value(extractor, features, reference, protocol))
    found += precision_recall_values(extractor, features, reference, protocol)
    if isinstance(extractor, InceptionFeatures) and extractor.layer == "2048":
        found.append(inception_score_value(extractor, extractor.logits(features), protocol))
    return found


def _faithfulness(images: Tensor, given: Tensor) -> dict[str, Tensor]:
    """How well a super-resolution stage keeps what it is given: its output, reduced again, against its input."""
    return {
        "low-res PSNR": psnr(reduce(images, given.shape[-1]), given),
        "colour shift": colour_shift(images, given),
    }


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
