"""Noise schedules as functions of t: x_t = alpha(t) x_0 + sigma(t) epsilon.

t is in [0, 1]; 0 is data (sigma 0 to the bit), 1 is noise. Code elsewhere uses alpha and sigma, never
sigmoid(log_snr): flow does not preserve variance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from imagen_lightning.types import InputError, Schedule

LOG_SNR_MIN = -20.0  # schedules end here instead of at -inf, where epsilon says nothing of x0


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


class LinearSchedule(Schedule):
    """Variance preserving with beta linear in t, Imagen's for 256 -> 1024 (Ho et al. 2020; Song et al. 2021, eq. 33).

    log alpha(t)^2 = -beta_min t - (beta_max - beta_min) t^2 / 2, which ends at a log-SNR of -10.05. It is the limit of
    DDPM's table of 1000 betas from 1e-4 to 0.02.

    Args:
        beta_min, beta_max: beta at t = 0 and at t = 1.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if not 0 < beta_min <= beta_max:
            raise InputError(f"beta_min {beta_min} must be positive and at most beta_max {beta_max}")
        self.beta_min = beta_min
        self.beta_max = beta_max

    def _log_alpha2(self, t: Tensor) -> Tensor:
        return -self.beta_min * t - (self.beta_max - self.beta_min) * t**2 / 2

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self._log_alpha2(t) / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(self._log_alpha2(t)))

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2); +inf at t = 0."""
        return self._log_alpha2(t) - torch.log(-torch.expm1(self._log_alpha2(t)))

    def time_at(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr`; beyond 1 for a log-SNR that the schedule does not reach."""
        depth = -F.logsigmoid(log_snr)  # -log alpha^2, of which t is the positive root
        root = torch.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * depth)
        return 2 * depth / (self.beta_min + root)

    def network_time(self, t: Tensor) -> Tensor:
        """The time as networks take it, in [0, 1000]."""
        return 1000.0 * t


class SigmoidSchedule(Schedule):
    """Variance preserving with alpha^2 a stretch of a sigmoid (Jabri et al. 2022; Chen 2023, algorithm 1).

    alpha(t)^2 = (S(end) - S(u)) / (S(end) - S(start)), u = start + t (end - start), S(u) = sigmoid(u / tau). The end is
    held at a log-SNR of -20 as the cosine's.

    Args:
        start, end: of the stretch.
        tau: temperature; below 1 more of the time is spent at the ends.
    """

    def __init__(self, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> None:
        if not start < end or not tau > 0 or (end - start) / tau > 80:
            raise InputError(
                f"sigmoid schedule from start {start} to end {end} at tau {tau}: start must be below end, and "
                "(end - start) / tau in (0, 80]"
            )
        self.start = start
        self.end = end
        self.tau = tau

    # S(a) - S(b) = sinh(a/2 - b/2) / (2 cosh(a/2) cosh(b/2)), here in units of tau: no digits cancel near the ends.

    @property
    def _width(self) -> float:
        return (self.end - self.start) / (2 * self.tau)

    def _over(self, t: Tensor) -> Tensor:
        return math.sinh(self._width) * torch.cosh(self.start / (2 * self.tau) + self._width * t)

    def _alpha2(self, t: Tensor) -> Tensor:
        alpha2 = torch.sinh(self._width * (1 - t)) * math.cosh(self.start / (2 * self.tau)) / self._over(t)
        return alpha2.clamp(min=1 / (1 + math.exp(-LOG_SNR_MIN)))

    def _sigma2(self, t: Tensor) -> Tensor:
        sigma2 = torch.sinh(self._width * t) * math.cosh(self.end / (2 * self.tau)) / self._over(t)
        return sigma2.clamp(max=1 / (1 + math.exp(LOG_SNR_MIN)))

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sqrt(self._alpha2(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(self._sigma2(t))

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2); +inf at t = 0."""
        return torch.log(self._alpha2(t)) - torch.log(self._sigma2(t))

    def time_at(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr`."""
        ratio = math.cosh(self.end / (2 * self.tau)) / math.cosh(self.start / (2 * self.tau))
        tangent = math.sinh(self._width) / (ratio * torch.exp(log_snr) + math.cosh(self._width))
        return torch.atanh(tangent) / self._width

    def network_time(self, t: Tensor) -> Tensor:
        """The time as networks take it, in [0, 1000]."""
        return 1000.0 * t


class DiscreteSchedule(Schedule):
    """A table of betas (Ho et al. 2020): step k = 0 … num_steps - 1 is t = (k + 1) / num_steps, t = 0 is data.

    Exact at its steps; between them log(alpha) is linear in t, as for DPM-Solver (Lu et al. 2022). Training draws steps
    alone. Networks are told k.

    Args:
        betas: "linear" from beta_start to beta_end (Ho et al. 2020, section 4), "squaredcos_cap_v2" (Nichol & Dhariwal
            2021, eq. 17, each beta at most 0.999; DeepFloyd IF's), or num_steps numbers in (0, 1).
        num_steps: of the table.
        beta_start, beta_end: of the linear table.

    Attributes:
        alphas_cumprod: (num_steps,) float64, alpha^2 of each step.
    """

    def __init__(
        self,
        betas: str | Sequence[float] = "linear",
        num_steps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
    ) -> None:
        if num_steps < 1:
            raise InputError(f"discrete schedule of num_steps {num_steps}; at least 1 is needed")
        self.betas = betas
        self.num_steps = num_steps
        self.beta_start = beta_start
        self.beta_end = beta_end
        table = self._table()
        if len(table) != num_steps or not bool(((table > 0) & (table < 1)).all()):
            raise InputError(
                f"the betas of a discrete schedule must be num_steps = {num_steps} numbers in (0, 1); got {len(table)} "
                f"from {float(table.min()) if len(table) else 0:g} to {float(table.max()) if len(table) else 0:g}"
            )
        self.alphas_cumprod = torch.cumprod(1 - table, 0)
        start = torch.zeros(1, dtype=torch.float64)
        self._alpha2 = torch.cat([start + 1, self.alphas_cumprod])
        self._sigma2 = torch.cat([start, 1 - self.alphas_cumprod])
        self._slope = torch.cat([torch.log1p(-table), start])  # of log alpha^2, a step

    def _table(self) -> Tensor:
        if not isinstance(self.betas, str):
            return torch.tensor(list(self.betas), dtype=torch.float64)
        if self.betas == "linear":
            return torch.linspace(self.beta_start, self.beta_end, self.num_steps, dtype=torch.float64)
        if self.betas == "squaredcos_cap_v2":
            t = torch.arange(self.num_steps + 1, dtype=torch.float64) / self.num_steps
            alpha2 = torch.cos((t + 0.008) / 1.008 * (math.pi / 2)) ** 2
            return (1 - alpha2[1:] / alpha2[:-1]).clamp(max=0.999)
        raise InputError(f"betas {self.betas!r} are unknown; use 'linear', 'squaredcos_cap_v2' or a list of numbers")

    def _position(self, t: Tensor) -> Tensor:
        """t in steps; within what float32 can tell of a step it is the step."""
        position = t * self.num_steps
        nearest = position.round()
        return torch.where((position - nearest).abs() < 2e-7 * self.num_steps, nearest, position)

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha^2 and sigma^2."""
        position = self._position(t)
        low = position.floor().long().clamp(0, self.num_steps)
        alpha2, sigma2, slope = (
            table.to(t.device, t.dtype)[low] for table in (self._alpha2, self._sigma2, self._slope)
        )
        inside = slope * (position - low)
        return alpha2 * torch.exp(inside), sigma2 - alpha2 * torch.expm1(inside)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sqrt(self._levels(t)[0])

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(self._levels(t)[1])

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2); +inf at t = 0."""
        alpha2, sigma2 = self._levels(t)
        return torch.log(alpha2) - torch.log(sigma2)

    def time_at(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr`, within [0, 1]."""
        depth = -F.logsigmoid(log_snr)  # -log alpha^2, which grows with t
        slope = -self._slope.to(log_snr.device, log_snr.dtype)
        table = F.pad(slope[:-1].cumsum(0), (1, 0))
        low = (torch.searchsorted(table, depth.contiguous(), right=True) - 1).clamp(0, self.num_steps - 1)
        return ((low + (depth - table[low]) / slope[low]) / self.num_steps).clamp(0, 1)

    def network_time(self, t: Tensor) -> Tensor:
        """The step k as networks take it, in [0, num_steps - 1]; fractional between steps."""
        return self._position(t) - 1

    def training_time(self, t: Tensor) -> Tensor:
        """The time of the step whose interval (k / num_steps, (k + 1) / num_steps] holds t."""
        return torch.ceil(self._position(t)).clamp(1, self.num_steps) / self.num_steps

    def level_time(self, level: Tensor) -> Tensor:
        """The time of step 1000 level, as DeepFloyd IF has it: 0.25 is step 250, and 0 has a first step's noise."""
        return ((1000 * level + 1) / self.num_steps).clamp(max=1)

    def training_level(self, level: Tensor) -> Tensor:
        """The level of the step whose interval (k / num_steps, (k + 1) / num_steps] holds the draw: k / 1000."""
        return self.network_time(self.training_time(level)) / 1000
