"""What the network predicts, and the way back to x0.

With x_t = alpha x0 + sigma epsilon, each parametrization gives its `target`, turns an output into x0, and says how an
error of the output scales into one of x0 (`x0_scale`), which is what carries a loss weight from one to another.
Every function takes tensors that broadcast against each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Parametrization(ABC):
    @abstractmethod
    def target(self, x0: Tensor, epsilon: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...

    @abstractmethod
    def x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...

    @abstractmethod
    def x0_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor: ...


class Epsilon(Parametrization):
    """The noise (Ho et al. 2020, eq. 14)."""

    def target(self, x0: Tensor, epsilon: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return epsilon

    def x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - sigma * output) / alpha

    def x0_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma / alpha


class X0(Parametrization):
    """The image itself."""

    def target(self, x0: Tensor, epsilon: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x0

    def x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return output

    def x0_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.ones_like(alpha)


class V(Parametrization):
    """v = alpha epsilon - sigma x0 (Salimans & Ho 2022, appendix D), for any alpha and sigma."""

    def target(self, x0: Tensor, epsilon: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * epsilon - sigma * x0

    def x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha * x_t - sigma * output) / (alpha**2 + sigma**2)

    def x0_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma / (alpha**2 + sigma**2)


class Flow(Parametrization):
    """The velocity epsilon - x0 of rectified flow (Liu et al. 2022, eq. 1, time reversed), for any alpha and sigma."""

    def target(self, x0: Tensor, epsilon: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return epsilon - x0

    def x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - sigma * output) / (alpha + sigma)

    def x0_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma / (alpha + sigma)
