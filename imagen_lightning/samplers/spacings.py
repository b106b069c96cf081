"""Where along [0, 1] a sampler steps: `spacing(num_steps, schedule)`, num_steps + 1 decreasing times, the last 0.

Those that go by a table's steps k, t = (k + 1) / N, take N from a `DiscreteSchedule` and 1000 for any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imagen_lightning.samplers.common import time_at
from imagen_lightning.samplers.step_lists import PUBLISHED
from imagen_lightning.types import InputError, Schedule, Spacing


def _check(num_steps: int) -> None:
    if num_steps < 1:
        raise InputError(f"{num_steps} sampling steps; at least 1 is needed")


def _table_size(schedule: Schedule) -> int:
    return getattr(schedule, "num_steps", 1000)


def _times_of(steps: Tensor, size: int) -> Tensor:
    """The times of a table's steps, from noise to data, then 0."""
    if len(steps) != len(torch.unique(steps)) or int(steps[0]) >= size or int(steps[-1]) < 0:
        raise InputError(
            f"{len(steps)} sampling steps from {int(steps[0])} to {int(steps[-1])} do not fit a table of {size}; take "
            "fewer steps"
        )
    return torch.cat([(steps.double() + 1) / size, torch.zeros(1, dtype=torch.float64)])


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
        levels = torch.linspace(self.low, self.high, num_steps, dtype=torch.float64)
        return torch.cat([time_at(schedule, "log-SNR spacing")(levels), torch.zeros(1, dtype=torch.float64)])


class KarrasTimes(Spacing):
    """Even in (sigma / alpha)^(1 / rho) from `sigma_max` to `sigma_min`, then 0 (Karras et al. 2022, eq. 5).

    Args:
        sigma_min, sigma_max: noise levels sigma / alpha of the last time but one and of the first.
        rho: the larger, the more steps near the data.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        if not 0 < sigma_min < sigma_max or not rho > 0:
            raise InputError(
                f"Karras spacing goes from sigma_max {sigma_max} down to sigma_min {sigma_min} above 0, with rho {rho} "
                "above 0"
            )
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.rho = rho

    def __call__(self, num_steps: int, schedule: Schedule) -> Tensor:
        """(num_steps + 1,) float64.

        Raises:
            InputError: the schedule has no `time_at`, the inverse of its log-SNR, or does not reach sigma_max.
        """
        _check(num_steps)
        inverse = time_at(schedule, "Karras spacing")
        first, last = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        sigmas = torch.linspace(first, last, num_steps, dtype=torch.float64) ** self.rho
        end = torch.ones((), dtype=torch.float64)
        most = float(schedule.sigma(end) / schedule.alpha(end))
        if self.sigma_max > most * (1 + 1e-6):
            raise InputError(f"Karras spacing's sigma_max {self.sigma_max} is beyond the schedule's end, {most:.6g}")
        times = inverse(-2 * torch.log(sigmas)).clamp(max=1)
        return torch.cat([times, torch.zeros(1, dtype=torch.float64)])


class LeadingTimes(Spacing):
    """Every (N // num_steps)th step from 0 up, backwards: DDPM and DDIM of diffusers, DeepFloyd IF's pipelines.

    It begins below the end of the table, at step 990 for 100 of 1000.

    Args:
        offset: added to every step.
    """

    def __init__(self, offset: int = 0) -> None:
        if offset < 0:
            raise InputError(f"leading spacing's offset {offset} must not be negative")
        self.offset = offset

    def __call__(self, num_steps: int, schedule: Schedule) -> Tensor:
        """(num_steps + 1,) float64."""
        _check(num_steps)
        size = _table_size(schedule)
        return _times_of(torch.arange(num_steps).flip(0) * (size // num_steps) + self.offset, size)


class LinspaceTimes(Spacing):
    """num_steps + 1 steps even from the first to the last, rounded, without the first: DPM-Solver++ of diffusers.

    Args:
        lambda_min: begin at the last step whose lambda, half the log-SNR, is at least this. A cosine schedule ends at
            so little signal that the first steps of a solver in lambda are lost on it; -5.1 is customary. None begins
            at the last step.
    """

    def __init__(self, lambda_min: float | None = None) -> None:
        self.lambda_min = lambda_min

    def __call__(self, num_steps: int, schedule: Schedule) -> Tensor:
        """(num_steps + 1,) float64."""
        _check(num_steps)
        size = _table_size(schedule)
        last = size
        if self.lambda_min is not None:
            times = (torch.arange(size, dtype=torch.float64) + 1) / size
            last = int((schedule.log_snr(times) / 2 >= self.lambda_min).sum())
            if last == 0:
                raise InputError(f"linspace spacing's lambda_min {self.lambda_min} leaves no step of the schedule")
        # multiples of the width, as numpy's linspace rounds them where two steps are equally near
        steps = (torch.arange(num_steps, 0, -1, dtype=torch.float64) * ((last - 1) / num_steps)).round()
        return _times_of(steps, size)


class TrailingTimes(Spacing):
    """num_steps steps even from the last of the table down, rounded (Lin et al. 2024, table 2)."""

    def __call__(self, num_steps: int, schedule: Schedule) -> Tensor:
        """(num_steps + 1,) float64."""
        _check(num_steps)
        size = _table_size(schedule)
        places = torch.arange(num_steps, dtype=torch.float64) * (size / num_steps)
        return _times_of((size - places).round() - 1, size)


class ListedTimes(Spacing):
    """A list of a table's steps, from noise to data.

    Args:
        steps: whole numbers that decrease, or the name of a published list. DeepFloyd IF's are "fast27", "smart27",
            "smart50", "smart100", "smart185", "super27", "super40" and "super100".
    """

    def __init__(self, steps: str | Sequence[int]) -> None:
        if isinstance(steps, str) and steps not in PUBLISHED:
            raise InputError(f"no list of steps is called {steps!r}; there are {', '.join(PUBLISHED)}")
        self.steps = steps
        self._steps = torch.tensor(PUBLISHED[steps] if isinstance(steps, str) else list(steps), dtype=torch.int64)
        if len(self._steps) == 0 or bool((self._steps.diff() >= 0).any()):
            raise InputError(f"a list of sampling steps must decrease and not be empty, got {self._steps.tolist()}")

    def __call__(self, num_steps: int, schedule: Schedule) -> Tensor:
        """(num_steps + 1,) float64.

        Raises:
            InputError: num_steps is not the list's length, or the schedule's table is shorter.
        """
        if num_steps != len(self._steps):
            raise InputError(
                f"the list of sampling steps has {len(self._steps)}, not {num_steps}; set the number of steps to "
                f"{len(self._steps)}"
            )
        return _times_of(self._steps, _table_size(schedule))
