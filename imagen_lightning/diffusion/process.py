"""The forward process, what is learnt from it, and the way back from an output to x0."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from imagen_lightning.diffusion.common import per_image as per_image
from imagen_lightning.diffusion.parametrizations import Parametrization
from imagen_lightning.diffusion.times import EvenTimes, TrainingTimes
from imagen_lightning.diffusion.variance import FixedVariance, LearnedRange
from imagen_lightning.diffusion.weightings import Weighting
from imagen_lightning.types import Denoised, InputError, Schedule


@dataclass(frozen=True)
class DiffusionProcess:
    """A schedule, what the network predicts on it, and how noise levels are drawn and weighted.

    All images are (B, C, H, W) in [-1, 1]; t is (B,) in [0, 1]. With a variance the network's output has 2C channels.
    """

    schedule: Schedule
    parametrization: Parametrization
    weighting: Weighting
    times: TrainingTimes = field(default_factory=EvenTimes)
    variance: LearnedRange | FixedVariance | None = None

    def __post_init__(self) -> None:
        """Refuse a learned variance for chains of another length than the schedule's table."""
        steps = getattr(self.schedule, "num_steps", None)
        if isinstance(self.variance, LearnedRange) and steps not in (None, self.variance.num_steps):
            raise InputError(
                f"{type(self.schedule).__name__} has num_steps {steps} and LearnedRange num_steps "
                f"{self.variance.num_steps}; its bound is of the schedule's chain: give both the same"
            )

    @property
    def learns_variance(self) -> bool:
        return isinstance(self.variance, LearnedRange)

    def coefficients(self, t: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t), shaped to multiply images."""
        return per_image(self.schedule.alpha(t), images), per_image(self.schedule.sigma(t), images)

    def add_noise(self, x0: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma epsilon (Kingma et al. 2021, eq. 1)."""
        alpha, sigma = self.coefficients(t, x0)
        return alpha * x0 + sigma * epsilon

    def training_times(self, u: Tensor) -> Tensor:
        """(B,) times of the training's distribution from (B,) numbers uniform in (0, 1)."""
        return self.schedule.training_time(self.times(u, self.schedule))

    def losses(self, output: Tensor, x0: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        """(B,) weighted mean squared errors of the network's output, in float32; L_hybrid with a learned variance."""
        alpha, sigma = self.coefficients(t, x0)
        prediction, fraction = self.split(output.to(x0.dtype), x0.shape[1])
        target = self.parametrization.target(x0, epsilon, alpha, sigma)
        errors = (prediction - target).square().flatten(1).mean(1)
        losses = errors * self.weighting(alpha, sigma, self.parametrization).flatten()
        if not isinstance(self.variance, LearnedRange) or fraction is None:
            return losses
        estimate = self.parametrization.x0(prediction, alpha * x0 + sigma * epsilon, alpha, sigma)
        return losses + self.variance.losses(Denoised(estimate, fraction), x0, t, self.schedule)

    def split(self, output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
        """The output's prediction and, where the variance is learned, its fraction v.

        Raises:
            InputError: the output has not the channels that this takes.
        """
        wanted = channels if self.variance is None else 2 * channels
        if output.shape[1] != wanted:
            raise InputError(wrong_channels(output.shape[1], wanted))
        if self.variance is None:
            return output, None
        prediction, raw = output.chunk(2, dim=1)
        return prediction, self.variance.fraction(raw)

    def x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The estimate of x0 that the network's output at (x_t, t) stands for; a learned variance is left aside."""
        alpha, sigma = self.coefficients(t, x_t)
        prediction, _ = self.split(output.to(x_t.dtype), x_t.shape[1])
        return self.parametrization.x0(prediction, x_t, alpha, sigma)

    def denoised(self, output: Tensor, x_t: Tensor, t: Tensor) -> Denoised:
        """The estimate of x0 and the learned variance's fraction.

        Raises:
            InputError: the variance is not learned.
        """
        _, fraction = self.split(output.to(x_t.dtype), x_t.shape[1])
        if fraction is None:
            raise InputError("the variance is not learned here: diffusion.variance is no LearnedRange")
        return Denoised(self.x0(output, x_t, t), fraction)


def wrong_channels(given: int, wanted: int) -> str:
    """What to say where a network's output has not the channels that a process takes."""
    return (
        f"the network gives {given} channels; its stage takes {wanted}. Channels for the variance go with diffusion."
        "variance: LearnedRange, as many again as the image has; without it the network gives the image's alone"
    )
