"""Where along [0, 1] a sampler steps: `spacing(num_steps, schedule)`, num_steps + 1 decreasing times, the last 0."""

from __future__ import annotations

import torch
from torch import Tensor

from imagen_lightning.types import InputError, Schedule, Spacing


def _check(num_steps: int) -> None:
    if num_steps < 1:
        raise InputError(f"{num_steps} sampling steps; at least 1 is needed")


class UniformTimes(Spacing):
    """Even in t from 1 to 0."""

    def __call__(self, num_steps: int, schedule: Schedule) -> Tensor:
        """(num_steps + 1,) float64."""
        _check(num_steps)
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)


class LogSNRTimes(Spacing):
    """Even in log-SNR from `low` to `high`, then 0 (Lu et al. 2022, DPM-Solver, section 3.4).

    Args:
        low: log-SNR of the first time.
        high: log-SNR of the last but one.
    """

    def __init__(self, low: float = -9.0, high: float = 9.0) -> None:
        if not low < high:
            raise InputError(f"log-SNR spacing goes from low {low} up to high {high}; low must be smaller")
        self.low = low
        self.high = high

    def __call__(self, num_steps: int, schedule: Schedule) -> Tensor:
        """(num_steps + 1,) float64.

        Raises:
            InputError: the schedule has no `time_at`, the inverse of its log-SNR.
        """
        _check(num_steps)
        if not hasattr(schedule, "time_at"):
            raise InputError(
                f"log-SNR spacing needs a schedule with time_at(log_snr); {type(schedule).__name__} has none"
            )
        inner = schedule.time_at(torch.linspace(self.low, self.high, num_steps, dtype=torch.float64))
        return torch.cat([inner, torch.zeros(1, dtype=torch.float64)])
