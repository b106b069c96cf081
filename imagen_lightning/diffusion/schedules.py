"""Noise schedules as functions of t: x_t = alpha(t) x_0 + sigma(t) epsilon.

t is in [0, 1]; 0 is data (sigma 0 to the bit), 1 is noise. Code elsewhere uses alpha and sigma, never
sigmoid(log_snr): flow does not preserve variance.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imagen_lightning.types import InputError, Schedule

LOG_SNR_MIN = -20.0  # the cosine ends here instead of at -inf, where epsilon says nothing of x0


class CosineSchedule(Schedule):
    """Cosine schedule (Nichol & Dhariwal 2021; continuous form, Kingma et al. 2021): alpha = cos(pi t / 2).

    The signal's end is held at a log-SNR of -20, so that alpha(1) is 4.5e-5 and epsilon can be turned into x0 at t = 1.
    """

    shift = 1.0

    def _angle(self, t: Tensor) -> Tensor:
        angle = t * (math.pi / 2)
        if self.shift != 1.0:
            angle = torch.atan2(self.shift * torch.sin(angle), torch.cos(angle))
        return angle.clamp(max=math.atan(math.exp(-LOG_SNR_MIN / 2)))

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(self._angle(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(self._angle(t))

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2); +inf at t = 0."""
        return -2 * torch.log(torch.tan(self._angle(t)))

    def time_at(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr`."""
        return torch.atan(torch.exp(-log_snr / 2) / self.shift) * (2 / math.pi)

    def network_time(self, t: Tensor) -> Tensor:
        """The time as networks take it, in [0, 1000]."""
        return 1000.0 * t


class ShiftedCosineSchedule(CosineSchedule):
    """Cosine schedule shifted for resolution (simple diffusion, Hoogeboom et al. 2023, eq. 6).

    log_snr(t) = cosine's log_snr(t) + 2 log(reference_size / image_size): the larger the image, the more noise is
    needed to hide as much of it.

    Args:
        image_size: pixels along a side of the images trained on.
        reference_size: the size for which the plain cosine is right.
    """

    def __init__(self, image_size: int, reference_size: int = 64) -> None:
        if image_size <= 0 or reference_size <= 0:
            raise InputError(f"image_size {image_size} and reference_size {reference_size} must be positive")
        self.image_size = image_size
        self.reference_size = reference_size
        self.shift = image_size / reference_size


class FlowSchedule(Schedule):
    """Rectified flow's straight line (Liu et al. 2022; Lipman et al. 2022): alpha = 1 - t, sigma = t.

    alpha is held at 4.5e-5 at the end, the same log-SNR of -20 as the cosine's.
    """

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - t).clamp(min=math.exp(LOG_SNR_MIN / 2))

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2); +inf at t = 0."""
        return 2 * (torch.log(self.alpha(t)) - torch.log(t))

    def time_at(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr`."""
        return torch.sigmoid(-log_snr / 2)

    def network_time(self, t: Tensor) -> Tensor:
        """The time as networks take it, in [0, 1000]."""
        return 1000.0 * t
