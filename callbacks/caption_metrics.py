"""How well a stage's pictures follow their captions: by CLIP, or for the built-in shapes by looking."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from imagen_lightning.callbacks.sampled_metric import Given, SampledMetric
from imagen_lightning.data.shapes import parse_caption
from imagen_lightning.metrics.caption_accuracy import caption_accuracy
from imagen_lightning.metrics.clip_score import clip_scores
from imagen_lightning.metrics.features import ClipFeatures
from imagen_lightning.metrics.protocol import Protocol, Value
from imagen_lightning.metrics.values import clip_score_value, share_value
from imagen_lightning.types import InputError


class CLIPScore(SampledMetric):
    """100 times the cosine of CLIP's embeddings of picture and caption, with a bootstrap interval.

    Args:
        clip: the model, by hub name or local folder; its weights stay out of checkpoints.
        **options: see SampledMetric.
    """

    metric = "CLIP score"

    def __init__(self, clip: ClipFeatures, **options: Any) -> None:
        super().__init__(**options)
        self.clip = clip

    def prepare(self, given: Given) -> None:
        self.clip.sha256  # noqa: B018  (loads the model)
        self.clip.resize_filter  # noqa: B018
        self.clip.text_features(given.captions[:1], given.device)

    def look(self, images: Tensor, given: Given) -> Tensor:
        return clip_scores(self.clip, images.to(given.device), given.own.captions).cpu()

    def value(self, found: Tensor, protocol: Protocol) -> Value:
        return clip_score_value(self.clip, found, protocol)


class CaptionAccuracy(SampledMetric):
    """The share of pictures of the built-in shapes that show all that their caption says, with Wilson's interval."""

    metric = "caption accuracy"

    def prepare(self, given: Given) -> None:
        try:
            for caption in given.captions:
                parse_caption(caption)
        except InputError as error:
            raise InputError(f"CaptionAccuracy is for the built-in shapes alone: {error}") from None

    def look(self, images: Tensor, given: Given) -> Tensor:
        return caption_accuracy(images, given.own.captions).all.long()

    def value(self, found: Tensor, protocol: Protocol) -> Value:
        return share_value(self.metric, found.bool(), protocol)
