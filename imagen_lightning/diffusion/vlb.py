"""The variational bound on the negative log likelihood, L_vlb = L_T + sum of L_t-1 + L_0, in bits per dimension.

Ho et al. 2020, eq. 5, for images of 8 bits as their eq. 13 has it. A step goes from t to s < t; the reverse process is
p(x_s | x_t) = N(the posterior's mean with x0 replaced by its estimate, exp(v log(large) + (1 - v) log(small))).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imagen_lightning.diffusion.common import per_image
from imagen_lightning.types import Denoised, Schedule


def step_variances(schedule: Schedule, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) small and large of the steps from t to s: the variances of q(x_s | x_t, x0) and of q(x_t | x_s).

    Ho et al. 2020, eq. 7; for any two times Kingma et al. 2021, eqs. 25-28. A step to s = 0 has no posterior variance:
    small is there that of the step of its length before it (Nichol & Dhariwal 2021).
    """

    def of(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        sigma2_t, sigma2_s = schedule.sigma(t) ** 2, schedule.sigma(s) ** 2
        large = sigma2_t - (schedule.alpha(t) / schedule.alpha(s)) ** 2 * sigma2_s
        return large * sigma2_s / sigma2_t, large

    small, large = of(t, s)
    before, _ = of((2 * t - s).clamp(max=1), t)
    return torch.where(s > 0, small, before), large


def prior_term(x0: Tensor, schedule: Schedule) -> Tensor:
    """(B,) L_T: the divergence of q(x_1 | x0) from N(0, I)."""
    end = torch.ones((), dtype=x0.dtype, device=x0.device)
    alpha, variance = schedule.alpha(end), schedule.sigma(end) ** 2
    nats = ((alpha * x0) ** 2 + variance - 1 - torch.log(variance)) / 2
    return _bits_per_dim(nats)


def bound_terms(denoised: Denoised, x0: Tensor, t: Tensor, s: Tensor, schedule: Schedule) -> Tensor:
    """(B,) L_t-1 of the steps from t to s, and L_0 of those whose s is 0.

    Args:
        denoised: the estimate of x0 (B, C, H, W) at (x_t, t), and v.
        x0: (B, C, H, W) in [-1, 1], pixels of 8 bits.
        t, s: (B,) in [0, 1], s < t.
        schedule: gives alpha and sigma.
    """
    small, large = (per_image(value, x0) for value in step_variances(schedule, t, s))
    log_variance = denoised.variance * torch.log(large) + (1 - denoised.variance) * torch.log(small)
    # the means differ by x0's share of the posterior's times the estimate's error
    share = per_image(schedule.alpha(s) / schedule.sigma(t) ** 2, x0) * large
    distance = (share * (x0 - denoised.x0)) ** 2
    divergence = (
        log_variance - torch.log(small) + torch.exp(torch.log(small) - log_variance) - 1
        + distance * torch.exp(-log_variance)
    ) / 2  # fmt: skip
    decoder = -discretized_log_likelihood(x0, denoised.x0, log_variance)
    return _bits_per_dim(torch.where(per_image(s, x0) > 0, divergence, decoder))


def discretized_log_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log N(mean, exp(log_variance)) of x0's bin, one of 256 in [-1, 1], outer two open (Ho et al. 2020, eq. 13)."""
    scale = torch.exp(-log_variance / 2)
    low, high = (x0 - mean - 1 / 255) * scale, (x0 - mean + 1 / 255) * scale
    # of two tails of a normal the left one keeps its digits
    near, far = torch.where(low > 0, -low, high), torch.where(low > 0, -high, low)
    log_near, log_far = torch.special.log_ndtr(near), torch.special.log_ndtr(far)
    tiny = torch.finfo(x0.dtype).tiny
    inner = log_near + torch.log((-torch.expm1(log_far - log_near)).clamp(min=tiny))
    lowest, highest = torch.special.log_ndtr(high), torch.special.log_ndtr(-low)
    return torch.where(x0 < -1 + 1 / 255, lowest, torch.where(x0 > 1 - 1 / 255, highest, inner))


def _bits_per_dim(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(1) / math.log(2)
