"""How much a sample's loss counts, by its noise level."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from imagen_lightning.diffusion.parametrizations import Parametrization
from imagen_lightning.types import InputError


class Weighting(ABC):
    @abstractmethod
    def __call__(self, alpha: Tensor, sigma: Tensor, parametrization: Parametrization) -> Tensor:
        """The factor on the squared error of the network's output, of alpha's shape."""
        ...


class Plain(Weighting):
    """The squared error of whatever the network predicts, as it is (L_simple, Ho et al. 2020, eq. 14)."""

    def __call__(self, alpha: Tensor, sigma: Tensor, parametrization: Parametrization) -> Tensor:
        return torch.ones_like(alpha)


class MinSNR(Weighting):
    """min(SNR, gamma) on the error of x0 (Hang et al. 2023, section 3.4), carried over to what the network predicts.

    For epsilon that is min(SNR, gamma) / SNR, for v on a variance-preserving schedule min(SNR, gamma) / (SNR + 1).

    Args:
        gamma: the SNR above which samples count no more; the paper's 5.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        if not gamma > 0:
            raise InputError(f"min-SNR gamma {gamma} must be positive")
        self.gamma = gamma

    def __call__(self, alpha: Tensor, sigma: Tensor, parametrization: Parametrization) -> Tensor:
        # SNR * x0_scale^2 is written without alpha / sigma, which overflows as sigma goes to 0.
        scale = parametrization.x0_scale(alpha, sigma) ** 2
        at_snr = (alpha * parametrization.x0_scale(alpha, sigma) / sigma.clamp(min=1e-30)) ** 2
        return torch.where(alpha**2 > self.gamma * sigma**2, self.gamma * scale, at_snr)
