"""DDPM's ancestral sampler (Ho, Jain & Abbeel 2020)."""

from __future__ import annotations

import math

from torch import Tensor

from imagen_lightning.samplers.common import batch_time, level, noise_like, steps
from imagen_lightning.types import Denoiser, Generator, InputError, Sampler, Schedule


class DDPM(Sampler):
    """Draws x_s from the posterior q(x_s | x_t, x0) with x0 replaced by its estimate.

    Args:
        variance: "small" is the posterior's own variance, right for data that is one point; "large" is the forward
            process's, right for data of unit variance (Ho et al. 2020, section 3.2).
    """

    def __init__(self, variance: str = "small") -> None:
        if variance not in ("small", "large"):
            raise InputError(f"DDPM variance {variance!r} is unknown; use 'small' or 'large'")
        self.variance = variance

    def __call__(
        self, denoise: Denoiser, x: Tensor, times: Tensor, *, schedule: Schedule, generator: Generator | None = None
    ) -> Tensor:
        for t, s in steps(times, x):
            x0 = denoise(x, batch_time(t, x))
            alpha_t, sigma_t = level(schedule, t)
            alpha_s, sigma_s = level(schedule, s)
            alpha_ts = alpha_t / alpha_s
            forward_variance = sigma_t**2 - alpha_ts**2 * sigma_s**2  # of q(x_t | x_s)
            # Ho et al. 2020, eq. 7, for any two times (Kingma et al. 2021, eqs. 25-28)
            x = (alpha_ts * sigma_s**2 / sigma_t**2) * x + (alpha_s * forward_variance / sigma_t**2) * x0
            if sigma_s > 0:
                small = forward_variance * sigma_s**2 / sigma_t**2
                x = x + math.sqrt(small if self.variance == "small" else forward_variance) * noise_like(x, generator)
        return x
