"""The forward process, what is learnt from it, and the way back from an output to x0."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from imagen_lightning.diffusion.parametrizations import Parametrization
from imagen_lightning.diffusion.weightings import Weighting
from imagen_lightning.types import Schedule


def per_image(value: Tensor, images: Tensor) -> Tensor:
    """(B,) to (B, 1, 1, 1), in the images' dtype."""
    return value.to(images.dtype).view(-1, *[1] * (images.dim() - 1))


@dataclass(frozen=True)
class DiffusionProcess:
    """A schedule, what the network predicts on it, and how noise levels are weighted.

    All images are (B, C, H, W) in [-1, 1]; t is (B,) in [0, 1].
    """

    schedule: Schedule
    parametrization: Parametrization
    weighting: Weighting

    def coefficients(self, t: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t), shaped to multiply images."""
        return per_image(self.schedule.alpha(t), images), per_image(self.schedule.sigma(t), images)

    def add_noise(self, x0: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma epsilon (Kingma et al. 2021, eq. 1)."""
        alpha, sigma = self.coefficients(t, x0)
        return alpha * x0 + sigma * epsilon

    def losses(self, output: Tensor, x0: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        """(B,) weighted mean squared errors of the network's output, in float32."""
        alpha, sigma = self.coefficients(t, x0)
        target = self.parametrization.target(x0, epsilon, alpha, sigma)
        errors = (output.to(x0.dtype) - target).square().flatten(1).mean(1)
        return errors * self.weighting(alpha, sigma, self.parametrization).flatten()

    def x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The estimate of x0 that the network's output at (x_t, t) stands for."""
        alpha, sigma = self.coefficients(t, x_t)
        return self.parametrization.x0(output.to(x_t.dtype), x_t, alpha, sigma)
