"""How much a sample's loss counts, by its noise level."""

from __future__ import annotations

import math
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
        scale = parametrization.x0_scale(alpha, sigma) ** 2
        capped = alpha**2 > self.gamma * sigma**2
        return torch.where(capped, self.gamma * scale, on_epsilon(alpha, sigma, parametrization))


class TruncatedSNR(Weighting):
    """max(SNR, 1) on the error of x0 (Salimans & Ho 2022, section 4): the larger of the errors of x0 and of epsilon."""

    def __call__(self, alpha: Tensor, sigma: Tensor, parametrization: Parametrization) -> Tensor:
        scale = parametrization.x0_scale(alpha, sigma) ** 2
        return torch.where(alpha > sigma, on_epsilon(alpha, sigma, parametrization), scale)


class SigmoidWeighting(Weighting):
    """sigmoid(bias - log-SNR) on the error of epsilon (Kingma & Gao 2023; Hoogeboom et al. 2024).

    The papers' w(log-SNR) at the times drawn; their integral over log-SNR (Kingma & Gao 2023, eq. 2) takes times drawn
    even in it.

    Args:
        bias: the log-SNR at which the weight is one half; above, it falls as 1 / SNR.
    """

    def __init__(self, bias: float = 2.0) -> None:
        self.bias = bias

    def __call__(self, alpha: Tensor, sigma: Tensor, parametrization: Parametrization) -> Tensor:
        share = sigma**2 / (sigma**2 + math.exp(-self.bias) * alpha**2)
        return share * on_epsilon(alpha, sigma, parametrization)


class P2(Weighting):
    """1 / (k + SNR)^gamma on the error of epsilon (Choi et al. 2022, eq. 8): less for the levels that clean up.

    Args:
        gamma: 0 weighs all alike; the paper's 1 and 0.5.
        k: keeps the weight finite as SNR goes to 0.
    """

    def __init__(self, gamma: float = 1.0, k: float = 1.0) -> None:
        if not gamma >= 0 or not k > 0:
            raise InputError(f"P2 gamma {gamma} must not be negative, k {k} must be positive")
        self.gamma = gamma
        self.k = k

    def __call__(self, alpha: Tensor, sigma: Tensor, parametrization: Parametrization) -> Tensor:
        share = (sigma**2 / (self.k * sigma**2 + alpha**2)) ** self.gamma
        return share * on_epsilon(alpha, sigma, parametrization)


def on_epsilon(alpha: Tensor, sigma: Tensor, parametrization: Parametrization) -> Tensor:
    """The weight that counts the squared error of epsilon as it is: SNR * x0_scale^2."""
    # written without alpha / sigma, which overflows as sigma goes to 0
    return (alpha * parametrization.x0_scale(alpha, sigma) / sigma.clamp(min=1e-30)) ** 2
