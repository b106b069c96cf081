"""At which times a network is trained: densities of t, as the inverses of their CDFs on numbers uniform in (0, 1).

What comes in is spread evenly over a batch (`random.spread_uniform`), and so is what goes out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from imagen_lightning.types import InputError, Schedule


class TrainingTimes(ABC):
    @abstractmethod
    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        """(B,) numbers in (0, 1) to (B,) times in [0, 1]."""
        ...


class EvenTimes(TrainingTimes):
    """Every t alike."""

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        return u


class LogitNormalTimes(TrainingTimes):
    """logit(t) ~ N(mean, std^2): the middle times of rectified flow (Esser et al. 2024, eq. 19).

    Args:
        mean: below 0 for more times near the data, above for more near the noise.
        std: the wider, the more times near both ends.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        if not std > 0:
            raise InputError(f"logit-normal times std {std} must be positive")
        self.mean = mean
        self.std = std

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


class LogNormalTimes(TrainingTimes):
    """log(sigma / alpha) ~ N(mean, std^2), EDM's distribution of the noise level (Karras et al. 2022, table 1).

    Levels beyond the schedule's last are trained at t = 1.

    Args:
        mean, std: the paper's P_mean and P_std.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2) -> None:
        if not std > 0:
            raise InputError(f"log-normal times std {std} must be positive")
        self.mean = mean
        self.std = std

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        if not hasattr(schedule, "time_at"):
            raise InputError(
                f"log-normal times need a schedule with time_at(log_snr); {type(schedule).__name__} has none"
            )
        return schedule.time_at(-2 * (self.mean + self.std * torch.special.ndtri(u))).clamp(0, 1)
