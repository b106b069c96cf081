"""The learned variance of the reverse process."""

from __future__ import annotations

import torch
from torch import Tensor

from imagen_lightning.diffusion.vlb import bound_terms
from imagen_lightning.types import Denoised, InputError, Schedule


class LearnedRange:
    """A second half of the network's channels says where in its range each pixel's log variance lies.

    Nichol & Dhariwal 2021, eq. 15 (diffusers' learned_range). It is trained by L_hybrid = L_simple + vlb_weight L_vlb
    (eq. 16), in whose second term the mean gets no gradient.

    Args:
        vlb_weight: the paper's lambda.
        num_steps: T of L_vlb, in bits per dimension; one term at the drawn time stands for the T of them, which is
            unbiased where times are drawn evenly. With a `DiscreteSchedule` it is its num_steps.
    """

    def __init__(self, vlb_weight: float = 0.001, num_steps: int = 1000) -> None:
        if not vlb_weight >= 0 or num_steps < 1:
            raise InputError(
                f"learned variance: vlb_weight {vlb_weight} must not be negative, num_steps {num_steps} at least 1"
            )
        self.vlb_weight = vlb_weight
        self.num_steps = num_steps

    def fraction(self, raw: Tensor) -> Tensor:
        """The network's channels, [-1, 1] for small to large, as `Denoised.variance`."""
        return (raw + 1) / 2

    def losses(self, denoised: Denoised, x0: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        """(B,) vlb_weight L_vlb from the term of the step that ends, or in continuous time begins, at t (B,)."""
        s = (t - 1 / self.num_steps).clamp(min=0)
        s = torch.where(s < 1e-3 / self.num_steps, torch.zeros_like(s), s)  # t - 1/T is not 0 to the bit at t = 1/T
        terms = bound_terms(Denoised(denoised.x0.detach(), denoised.variance), x0, t, s, schedule)
        return self.vlb_weight * self.num_steps * terms


class FixedVariance:
    """Leaves a network's second half of channels aside: neither trained nor sampled with.

    For fine-tuning, by the loss on the prediction alone (L_simple), a network that once learned its variance; the
    channels drift and say nothing afterwards. A sampler then takes a variance of its own, as DDPM's "small".
    """

    def fraction(self, raw: Tensor) -> None:
        """None: there is no learned variance."""
