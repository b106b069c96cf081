"""Noise on the low-resolution image that conditions super-resolution (Ho et al. 2021; Saharia et al. 2022, 2.4)."""

from __future__ import annotations

from torch import Tensor

from imagen_lightning.diffusion.process import per_image
from imagen_lightning.diffusion.schedules import CosineSchedule
from imagen_lightning.types import InputError, Schedule


class LowResAugmentation:
    """Variance-preserving Gaussian noise at a level in [0, 1]: alpha(level) z + sigma(level) epsilon.

    Args:
        schedule: gives alpha and sigma of a level; with a DiscreteSchedule, as DeepFloyd IF has it, level k / 1000 is
            that of its step k.
        max_level: training draws levels uniformly from [0, max_level].
    """

    def __init__(self, schedule: Schedule | None = None, max_level: float = 1.0) -> None:
        if not 0 <= max_level <= 1:
            raise InputError(f"augmentation max_level {max_level} must be in [0, 1]")
        self.schedule = schedule if schedule is not None else CosineSchedule()
        self.max_level = max_level

    def levels(self, u: Tensor) -> Tensor:
        """(B,) levels to train at from (B,) numbers uniform in (0, 1)."""
        return self.schedule.training_level(self.max_level * u)

    def __call__(self, low_res: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """Noises low_res (B, C, H, W) at level (B,) with `noise` of its shape."""
        time = self.schedule.level_time(level)
        alpha, sigma = self.schedule.alpha(time), self.schedule.sigma(time)
        return per_image(alpha, low_res) * low_res + per_image(sigma, low_res) * noise
