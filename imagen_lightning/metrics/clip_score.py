"""How well a picture and its caption agree, by CLIP (Hessel et al. 2021, without its factor 2.5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imagen_lightning.errors import InputError
from imagen_lightning.metrics.features.clip import ClipFeatures


def clip_scores(clip: ClipFeatures, images: Tensor, captions: Sequence[str], batch_size: int = 64) -> Tensor:
    """100 times the cosine between the embeddings of each picture and its caption: (N,) float64.

    As in torchmetrics' CLIPScore and the figures of Imagen; published scores are means of such numbers. They are not
    cut at 0.

    Args:
        clip: the model.
        images: (N, 3, H, W) uint8.
        captions: N.
        batch_size: pictures at once.

    Raises:
        InputError: not one caption a picture, images of another dtype or shape, a model that cannot be had.
    """
    if len(images) != len(captions):
        raise InputError(f"{len(images)} images but {len(captions)} captions; give one caption an image")
    scores = []
    for start in range(0, len(images), batch_size):
        of_images = clip(images[start : start + batch_size]).double()
        of_captions = clip.text_features(captions[start : start + batch_size], images.device).double()
        scores.append(100 * torch.cosine_similarity(of_images, of_captions, dim=1))
    return torch.cat(scores) if scores else torch.zeros(0, dtype=torch.float64, device=images.device)
