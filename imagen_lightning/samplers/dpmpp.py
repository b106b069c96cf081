"""DPM-Solver++ (Lu et al. 2022b, arXiv 2211.01095): the two-step solvers of the probability flow and of the SDE."""

from __future__ import annotations

import math

from torch import Tensor

from imagen_lightning.samplers.common import batch_time, level, noise_like, steps
from imagen_lightning.types import Denoiser, Generator, InputError, Sampler, Schedule


class DPMSolverPP(Sampler):
    """DPM-Solver++ 2M, the two-step solver of the probability flow in x0 (algorithm 2).

    The first step, and a last one that ends at sigma = 0, are of first order.

    Args:
        lower_order_below: a run of fewer steps than this takes its last step in first order wherever it ends, which is
            steadier in few steps; diffusers has 15.
    """

    def __init__(self, lower_order_below: int = 0) -> None:
        if lower_order_below < 0:
            raise InputError(f"DPM-Solver++ lower_order_below {lower_order_below} must not be negative")
        self.lower_order_below = lower_order_below

    def __call__(
        self, denoise: Denoiser, x: Tensor, times: Tensor, *, schedule: Schedule, generator: Generator | None = None
    ) -> Tensor:
        memory = _Memory(self.lower_order_below, times)
        for t, s in steps(times, x):
            x0 = denoise(x, batch_time(t, x))
            _, sigma_t = level(schedule, t)
            alpha_s, sigma_s = level(schedule, s)
            if sigma_s == 0:
                return alpha_s * x0
            h = _step(schedule, t, s)
            x = (sigma_s / sigma_t) * x - alpha_s * math.expm1(-h) * memory.direction(x0, h)
        return x


class DPMSolverPPSDE(Sampler):
    """SDE-DPM-Solver++ 2M, the two-step solver of the reverse-time SDE in x0 (of the same paper).

    It draws from the data's distribution in fewer steps than DDPM. The first step, and a last one that ends at sigma =
    0, are of first order.

    Args:
        lower_order_below: a run of fewer steps than this takes its last step in first order wherever it ends; diffusers
            has 15.
    """

    def __init__(self, lower_order_below: int = 0) -> None:
        if lower_order_below < 0:
            raise InputError(f"DPM-Solver++ lower_order_below {lower_order_below} must not be negative")
        self.lower_order_below = lower_order_below

    def __call__(
        self, denoise: Denoiser, x: Tensor, times: Tensor, *, schedule: Schedule, generator: Generator | None = None
    ) -> Tensor:
        memory = _Memory(self.lower_order_below, times)
        for t, s in steps(times, x):
            x0 = denoise(x, batch_time(t, x))
            _, sigma_t = level(schedule, t)
            alpha_s, sigma_s = level(schedule, s)
            if sigma_s == 0:
                return alpha_s * x0
            h = _step(schedule, t, s)
            share = -math.expm1(-2 * h)  # of the noise at s that is new
            x = (sigma_s / sigma_t) * math.exp(-h) * x + alpha_s * share * memory.direction(x0, h)
            x = x + sigma_s * math.sqrt(share) * noise_like(x, generator)
        return x


def _step(schedule: Schedule, t: Tensor, s: Tensor) -> float:
    """h, from t to s in lambda, half the log-SNR."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = level(schedule, t), level(schedule, s)
    return math.log(alpha_s / sigma_s) - math.log(alpha_t / sigma_t)


class _Memory:
    """The last x0 and the step in lambda that followed it."""

    def __init__(self, lower_order_below: int, times: Tensor) -> None:
        num_steps = len(times) - 1
        self._left = num_steps
        self._lower_order_end = num_steps < lower_order_below
        self._last: tuple[Tensor, float] | None = None

    def direction(self, x0: Tensor, h: float) -> Tensor:
        """x0 carried on to the middle of the step by its change over the last one (algorithm 2, D)."""
        self._left -= 1
        direction = x0
        if self._last is not None and not (self._lower_order_end and self._left == 0):
            last_x0, last_h = self._last
            direction = x0 + (x0 - last_x0) * (h / (2 * last_h))
        self._last = (x0, h) if h > 0 else None  # times beyond a schedule's last log-SNR are one and the same
        return direction
