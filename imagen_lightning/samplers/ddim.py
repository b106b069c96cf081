"""DDIM (Song, Meng & Ermon 2021)."""

from __future__ import annotations

import math

from torch import Tensor

from imagen_lightning.samplers.common import batch_time, level, noise_like, steps
from imagen_lightning.types import Denoiser, Generator, InputError, Sampler, Schedule


class DDIM(Sampler):
    """Steps along the probability flow, or with a share of DDPM's noise.

    Args:
        eta: 0 is deterministic, 1 has the variance of DDPM's posterior (Song et al. 2021, eq. 16).
    """

    def __init__(self, eta: float = 0.0) -> None:
        if not 0 <= eta <= 1:
            raise InputError(f"DDIM eta {eta} must be in [0, 1]")
        self.eta = eta

    def __call__(
        self, denoise: Denoiser, x: Tensor, times: Tensor, *, schedule: Schedule, generator: Generator | None = None
    ) -> Tensor:
        for t, s in steps(times, x):
            x0 = denoise(x, batch_time(t, x))
            alpha_t, sigma_t = level(schedule, t)
            alpha_s, sigma_s = level(schedule, s)
            epsilon = (x - alpha_t * x0) / sigma_t
            small = (sigma_s / sigma_t) ** 2 * (sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2)
            variance = self.eta**2 * small
            x = alpha_s * x0 + math.sqrt(max(sigma_s**2 - variance, 0.0)) * epsilon  # Song et al. 2021, eq. 12
            if variance > 0:
                x = x + math.sqrt(variance) * noise_like(x, generator)
        return x
