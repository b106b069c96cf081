"""Classifier-free guidance as a wrapper of `denoise`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imagen_lightning.diffusion.common import per_image
from imagen_lightning.types import Denoised, Denoiser, InputError, Schedule


def guide(denoise: Denoiser, scale: float | Sequence[float] | Tensor, rescale: float = 0.0) -> Denoiser:
    """Guided denoiser x0 = x0_null + scale (x0_text - x0_null) (Ho & Salimans 2022, eq. 6; the same in x0 and epsilon).

    Args:
        denoise: takes a batch of 2B, whose first half is bound to the text and second half to the null text. One call
            serves both, so that a step costs one pass.
        scale: guidance weight; 1 is the conditional model. One number, or one an image.
        rescale: in [0, 1], the share of the result whose standard deviation, image by image, is made that of x0_text
            (Lin et al. 2024, eqs. 15-16, on x0).
    """
    if not 0 <= rescale <= 1:
        raise InputError(f"guidance rescale {rescale} must be in [0, 1]")

    def guided(x_t: Tensor, t: Tensor) -> Tensor | Denoised:
        both = denoise(torch.cat([x_t, x_t]), torch.cat([t, t]))
        x0 = both.x0 if isinstance(both, Denoised) else both
        with_text, without = x0.chunk(2)
        weight = scale if isinstance(scale, float | int) else per_image(torch.as_tensor(scale, device=x_t.device), x_t)
        result = without + weight * (with_text - without)
        if rescale > 0:
            wanted, found = (per_image(value.flatten(1).std(1), value) for value in (with_text, result))
            result = torch.lerp(result, result * wanted / found.clamp(min=1e-8), rescale)
        return Denoised(result, both.variance.chunk(2)[0]) if isinstance(both, Denoised) else result

    return guided  # type: ignore[return-value]


def within(guided: Denoiser, plain: Denoiser, interval: tuple[float, float], schedule: Schedule) -> Denoiser:
    """`guided` where the noise level is in the interval, else `plain` (Kynkäänniemi et al. 2024).

    Args:
        guided: what `guide` made.
        plain: bound to the text alone, B images at a time; it costs half.
        interval: (low, high] of sigma / alpha, which is the paper's sigma.
        schedule: gives sigma / alpha of the time, the same for all images of a step.
    """
    low, high = interval

    def either(x_t: Tensor, t: Tensor) -> Tensor | Denoised:
        time = t[0].to("cpu", torch.float64)
        level = float(schedule.sigma(time) / schedule.alpha(time))
        return guided(x_t, t) if low < level <= high else plain(x_t, t)

    return either  # type: ignore[return-value]
