"""Classifier-free guidance as a wrapper of `denoise`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imagen_lightning.diffusion.process import per_image
from imagen_lightning.types import Denoised, Denoiser


def guide(denoise: Denoiser, scale: float | Sequence[float] | Tensor) -> Denoiser:
    """Guided denoiser x0 = x0_null + scale (x0_text - x0_null) (Ho & Salimans 2022, eq. 6; the same in x0 and epsilon).

    Args:
        denoise: takes a batch of 2B, whose first half is bound to the text and second half to the null text. One call
            serves both, so that a step costs one pass.
        scale: guidance weight; 1 is the conditional model. One number, or one an image.
    """

    def guided(x_t: Tensor, t: Tensor) -> Tensor | Denoised:
        both = denoise(torch.cat([x_t, x_t]), torch.cat([t, t]))
        x0 = both.x0 if isinstance(both, Denoised) else both
        with_text, without = x0.chunk(2)
        weight = scale if isinstance(scale, float | int) else per_image(torch.as_tensor(scale, device=x_t.device), x_t)
        result = without + weight * (with_text - without)
        return Denoised(result, both.variance.chunk(2)[0]) if isinstance(both, Denoised) else result

    return guided  # type: ignore[return-value]
