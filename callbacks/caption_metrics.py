"""How well a stage's pictures follow their captions: by CLIP, or for the built-in shapes by looking."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from imagen_lightning.callbacks.drawing import Pictures
from imagen_lightning.callbacks.sampled_metric import SampledMetric
from imagen_lightning.metrics import caption_accuracy
from imagen_lightning.metrics.clip_score import clip_scores
from imagen_lightning.metrics.confidence import bootstrap_mean, wilson
from imagen_lightning.metrics.distributed import gather_by_position
from imagen_lightning.metrics.features import ClipFeatures
from imagen_lightning.metrics.protocol import Protocol, Value


class CLIPScore(SampledMetric):
    """100 times the cosine of CLIP's embeddings of picture and caption, with a bootstrap interval.

    Args:
        clip: the model, by hub name or local folder; its weights stay out of checkpoints.
        **options: see SampledMetric.
    """

    def __init__(self, clip: ClipFeatures, **options: Any) -> None:
        super().__init__(**options)
        self.clip = clip

    def measure(self, images: Tensor, positions: Tensor, given: Pictures, protocol: Protocol) -> list[Value]:
        captions = [given.captions[position] for position in positions.tolist()]
        scores = gather_by_position(clip_scores(self.clip, images, captions), positions)
        low, high = bootstrap_mean(scores)
        named = replace(
            protocol,
            metric="CLIP score",
            extractor=self.clip.name,
            extractor_sha256=self.clip.sha256,
            resize_filter=self.clip.resize_filter,
        )
        return [Value("CLIP score", scores.mean().item(), low, high, named, "95% bootstrap")]


class CaptionAccuracy(SampledMetric):
    """The share of pictures of the built-in shapes that show all that their caption says, with Wilson's interval."""

    def measure(self, images: Tensor, positions: Tensor, given: Pictures, protocol: Protocol) -> list[Value]:
        captions = [given.captions[position] for position in positions.tolist()]
        right = gather_by_position(caption_accuracy(images, captions).all.long(), positions)
        low, high = wilson(int(right.sum()), len(right))
        named = replace(protocol, metric="caption accuracy")
        return [Value("caption accuracy", right.double().mean().item(), low, high, named, "95% Wilson")]
