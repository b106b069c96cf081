"""Heun's method with churn, EDM's sampler (Karras et al. 2022)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imagen_lightning.samplers.common import batch_time, level, noise_like, steps, time_at
from imagen_lightning.types import Denoiser, Generator, InputError, Sampler, Schedule


class Heun(Sampler):
    """Second order by two evaluations a step; with churn, noise is added before each step and taken off in it.

    Karras et al. 2022, algorithm 2, on x / alpha, whose noise level is sigma / alpha. The last step to sigma = 0 is
    Euler's and takes one evaluation.

    Args:
        churn: S_churn: before a step the noise level rises by the factor 1 + min(churn / steps, sqrt(2) - 1).
        churn_min, churn_max: S_tmin and S_tmax, the noise levels sigma / alpha between which it rises; None for no end.
        noise_scale: S_noise, standard deviation of the noise that is added.
    """

    evaluations_per_step = 2

    def __init__(
        self, churn: float = 0.0, churn_min: float = 0.0, churn_max: float | None = None, noise_scale: float = 1.0
    ) -> None:
        if not churn >= 0 or not 0 <= churn_min < (math.inf if churn_max is None else churn_max):
            raise InputError(
                f"Heun churn {churn} must not be negative, its range from {churn_min} to {churn_max} must rise from 0"
            )
        self.churn = churn
        self.churn_min = churn_min
        self.churn_max = churn_max
        self.noise_scale = noise_scale

    def __call__(
        self, denoise: Denoiser, x: Tensor, times: Tensor, *, schedule: Schedule, generator: Generator | None = None
    ) -> Tensor:
        gamma = min(self.churn / (len(times) - 1), math.sqrt(2) - 1) if len(times) > 1 else 0.0
        inverse = time_at(schedule, "Heun's churn") if gamma > 0 else None
        highest = math.inf if self.churn_max is None else self.churn_max
        for t, s in steps(times, x):
            alpha_t, sigma_t = level(schedule, t)
            alpha_s, sigma_s = level(schedule, s)
            y, noise_t, noise_s = x / alpha_t, sigma_t / alpha_t, sigma_s / alpha_s
            if inverse is not None and self.churn_min <= noise_t <= highest:
                raised = noise_t * (1 + gamma)
                t = inverse(torch.tensor(-2 * math.log(raised), dtype=torch.float64)).clamp(max=1)
                alpha_t, sigma_t = level(schedule, t)  # no more than the schedule has
                raised = max(sigma_t / alpha_t, noise_t)
                y = y + math.sqrt(raised**2 - noise_t**2) * self.noise_scale * noise_like(x, generator)
                noise_t = raised
            x0 = denoise(alpha_t * y, batch_time(t, x))
            slope = (y - x0) / noise_t  # of x / alpha over sigma / alpha
            if sigma_s == 0:
                return alpha_s * x0
            there = y + (noise_s - noise_t) * slope
            x0 = denoise(alpha_s * there, batch_time(s, x))
            slope = (slope + (there - x0) / noise_s) / 2
            x = alpha_s * (y + (noise_s - noise_t) * slope)
        return x
