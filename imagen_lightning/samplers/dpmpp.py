"""DPM-Solver++ (Lu et al. 2022b, arXiv 2211.01095)."""

from __future__ import annotations

import math

from torch import Tensor

from imagen_lightning.samplers.common import batch_time, level, steps
from imagen_lightning.types import Denoiser, Generator, Sampler, Schedule


class DPMSolverPP(Sampler):
    """DPM-Solver++ 2M, the two-step solver of the probability flow in x0 (algorithm 2).

    The first step, and a last one that ends at sigma = 0, are of first order.
    """

    def __call__(
        self, denoise: Denoiser, x: Tensor, times: Tensor, *, schedule: Schedule, generator: Generator | None = None
    ) -> Tensor:
        previous: tuple[Tensor, float] | None = None  # the last x0 and the step in lambda that followed it
        for t, s in steps(times, x):
            x0 = denoise(x, batch_time(t, x))
            alpha_t, sigma_t = level(schedule, t)
            alpha_s, sigma_s = level(schedule, s)
            if sigma_s == 0:
                return alpha_s * x0
            h = math.log(alpha_s / sigma_s) - math.log(alpha_t / sigma_t)  # lambda is half the log-SNR
            if previous is None:
                direction = x0
            else:
                last_x0, last_h = previous
                direction = x0 + (x0 - last_x0) * (h / (2 * last_h))
            x = (sigma_s / sigma_t) * x - alpha_s * math.expm1(-h) * direction
            previous = (x0, h) if h > 0 else None  # times beyond a schedule's last log-SNR are one and the same
        return x
