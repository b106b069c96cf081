"""DDPM's ancestral sampler (Ho, Jain & Abbeel 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imagen_lightning.samplers.common import batch_time, level, noise_like, steps
from imagen_lightning.types import Denoised, Denoiser, Generator, InputError, Sampler, Schedule


class DDPM(Sampler):
    """Draws x_s from the posterior q(x_s | x_t, x0) with x0 replaced by its estimate.

    Args:
        variance: "small" is the posterior's own variance, right for data that is one point; "large" is the forward
            process's, right for data of unit variance (Ho et al. 2020, section 3.2); "learned" is what the network
            gives, between them in the logarithm (Nichol & Dhariwal 2021, eq. 15).
    """

    def __init__(self, variance: str = "small") -> None:
        if variance not in ("small", "large", "learned"):
            raise InputError(f"DDPM variance {variance!r} is unknown; use 'small', 'large' or 'learned'")
        self.variance = variance
        self.needs_variance = variance == "learned"

    def __call__(
        self, denoise: Denoiser, x: Tensor, times: Tensor, *, schedule: Schedule, generator: Generator | None = None
    ) -> Tensor:
        for t, s in steps(times, x):
            answer = denoise(x, batch_time(t, x))
            if self.needs_variance and not isinstance(answer, Denoised):
                raise InputError("DDPM with learned variance needs a denoiser that gives Denoised(x0, variance)")
            x0 = answer.x0 if isinstance(answer, Denoised) else answer
            alpha_t, sigma_t = level(schedule, t)
            alpha_s, sigma_s = level(schedule, s)
            alpha_ts = alpha_t / alpha_s
            forward_variance = sigma_t**2 - alpha_ts**2 * sigma_s**2  # of q(x_t | x_s)
            # Ho et al. 2020, eq. 7, for any two times (Kingma et al. 2021, eqs. 25-28)
            x = (alpha_ts * sigma_s**2 / sigma_t**2) * x + (alpha_s * forward_variance / sigma_t**2) * x0
            if sigma_s > 0:
                small = forward_variance * sigma_s**2 / sigma_t**2
                noise = noise_like(x, generator)
                if self.needs_variance and isinstance(answer, Denoised):
                    v = answer.variance
                    log_variance = v * math.log(forward_variance) + (1 - v) * math.log(small)
                    x = x + torch.exp(log_variance / 2) * noise
                else:
                    x = x + math.sqrt(small if self.variance == "small" else forward_variance) * noise
        return x
