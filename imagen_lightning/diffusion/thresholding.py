"""Keeping x0 within the range of images during sampling: wrappers of `denoise`."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from imagen_lightning.types import Denoised, Denoiser, InputError


class Thresholding(ABC):
    @abstractmethod
    def __call__(self, x0: Tensor) -> Tensor: ...


class NoThresholding(Thresholding):
    """Leaves x0 as it is."""

    def __call__(self, x0: Tensor) -> Tensor:
        return x0


class StaticThresholding(Thresholding):
    """Clips x0 to [-1, 1] (Saharia et al. 2022, section 2.3)."""

    def __call__(self, x0: Tensor) -> Tensor:
        return x0.clamp(-1, 1)


class DynamicThresholding(Thresholding):
    """Clips each x0 to [-s, s] and divides by s, s its own percentile of |x0|, at least 1 (Saharia et al. 2022, 2.3).

    Args:
        percentile: in (0, 1]. The paper leaves it open; 0.95 is DeepFloyd IF's.
        max_value: the largest s. DeepFloyd IF has 1.5 for its base stage and 1.0 for super-resolution.
    """

    def __init__(self, percentile: float = 0.95, max_value: float = 1.5) -> None:
        if not 0 < percentile <= 1:
            raise InputError(f"dynamic thresholding percentile {percentile} must be in (0, 1]")
        if max_value < 1:
            raise InputError(f"dynamic thresholding max_value {max_value} must be at least 1")
        self.percentile = percentile
        self.max_value = max_value

    def __call__(self, x0: Tensor) -> Tensor:
        flat = x0.float().abs().flatten(1)
        # torch.quantile refuses more than 16M values and sorts them all; the percentile is one row's k-th largest.
        rank = self.percentile * (flat.shape[1] - 1)
        low = int(rank)
        top = torch.topk(flat, flat.shape[1] - low, dim=1).values
        lower = top[:, -1]
        upper = top[:, -2] if top.shape[1] > 1 else lower
        s = torch.lerp(lower, upper, rank - low).clamp(1, self.max_value).to(x0.dtype).view(-1, 1, 1, 1)
        return x0.clamp(-s, s) / s


def threshold(denoise: Denoiser, rule: Thresholding) -> Denoiser:
    """A denoiser whose x0 passes through `rule`; a learned variance passes untouched."""

    def thresholded(x_t: Tensor, t: Tensor) -> Tensor | Denoised:
        result = denoise(x_t, t)
        return Denoised(rule(result.x0), result.variance) if isinstance(result, Denoised) else rule(result)

    return thresholded  # type: ignore[return-value]
