"""The variational bound of a stage on the negative log likelihood of its images, in bits per dimension."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from imagen_lightning.diffusion import DiffusionProcess
from imagen_lightning.diffusion.random import normal, uniform
from imagen_lightning.diffusion.vlb import bound_terms, prior_term
from imagen_lightning.types import Batch, Conditioning, Denoised, InputError

_STREAM = 1 << 20  # of the random numbers: beyond those of training and of sampling; step k's noise is at _STREAM + k
_FRACTIONS = {"small": 0.0, "large": 1.0}


class Stage(Protocol):
    """What is asked of a stage; every `DiffusionMixin` has it."""

    network: nn.Module
    process: DiffusionProcess

    def condition(self, batch: Batch, seed: int, training: bool) -> tuple[Tensor, Conditioning]: ...

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor: ...


@dataclass(frozen=True)
class VariationalBound:
    """L_vlb = L_T + sum of L_t-1 + L_0 (Ho et al. 2020, eq. 5), one number an image in bits per dimension.

    Attributes:
        prior: (B,) L_T, what is left of the image at t = 1.
        diffusion: (B,) the sum of L_t-1 over t = 2 … T.
        decoder: (B,) L_0, the 8-bit image given the last step.
        terms: (num_steps,) means over the images by step, L_0 first, NaN for a step that no image was given.
    """

    prior: Tensor
    diffusion: Tensor
    decoder: Tensor
    terms: Tensor

    @property
    def total(self) -> Tensor:
        """(B,) L_vlb."""
        return self.prior + self.diffusion + self.decoder

    def mean(self) -> dict[str, float]:
        """Means over the images."""
        parts = {"total": self.total, "prior": self.prior, "diffusion": self.diffusion, "decoder": self.decoder}
        return {name: float(values.mean()) for name, values in parts.items()}


@torch.no_grad()
def variational_bound(
    stage: Stage,
    batches: Iterable[Batch],
    *,
    num_steps: int = 1000,
    steps_per_image: int | None = None,
    variance: str = "small",
    seed: int = 0,
) -> VariationalBound:
    """The bound of a stage's reverse process in num_steps even steps.

    The estimate of x0 is the network's own: no guidance, no thresholding. Noise is a function of (seed, step,
    position), so that two stages are measured on the same. Where sigma(1 / num_steps) is below half a level of 8 bits,
    1/255, as the cosine's and flow's is at a thousand steps, the bound counts digits that images do not have: there a
    network must know the levels, or take fewer steps.

    Args:
        stage: base or super-resolution; its text is the captions', its low-resolution images are noised as in
            validation.
        batches: on the stage's device, images of 8 bits.
        num_steps: T.
        steps_per_image: network evaluations an image beside L_0's: all T - 1 (None), or so many, spread over them at
            random, from which the sum is estimated without bias.
        variance: "small" or "large" of the reverse process (Ho et al. 2020, section 3.2) where the stage learns none.
        seed: of the noise.

    Raises:
        InputError: no batches, an unknown variance, numbers of steps out of range.
    """
    if variance not in _FRACTIONS:
        raise InputError(f"variance {variance!r} of the bound is unknown; use 'small' or 'large'")
    if num_steps < 2:
        raise InputError(f"the bound's num_steps {num_steps} must be at least 2")
    count = num_steps - 1 if steps_per_image is None else steps_per_image
    if not 1 <= count <= num_steps - 1:
        raise InputError(f"steps_per_image {count} must be in 1..{num_steps - 1}, num_steps without the last")
    network = stage.network
    module = stage if isinstance(stage, nn.Module) else network  # a stage may train more than its network
    was_training = module.training
    module.eval()
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    sums, counts = torch.zeros(2, num_steps, dtype=torch.float64)
    try:
        for batch in batches:
            x0, conditioning = stage.condition(batch, seed, training=False)
            precompute = getattr(network, "precompute", None)
            if precompute is not None:
                conditioning = precompute(conditioning)
            # step k goes from (k + 1) / T to k / T; one in each of `count` equal parts of 1 … T - 1
            offsets = uniform(seed, _STREAM, batch.positions)[:, None]
            places = torch.arange(count, device=x0.device)[None]
            steps = 1 + ((places + offsets) * ((num_steps - 1) / count)).long().clamp(max=num_steps - 2)
            if count == num_steps - 1:
                steps = 1 + places.expand(len(x0), -1)
            decoder = _terms(stage, x0, conditioning, batch, torch.zeros_like(steps[:, 0]), num_steps, variance, seed)
            total = torch.zeros_like(decoder)
            for k in steps.T:
                found = _terms(stage, x0, conditioning, batch, k, num_steps, variance, seed)
                total += found
                sums.index_add_(0, k.cpu(), found.double().cpu())
                counts.index_add_(0, k.cpu(), torch.ones(len(x0), dtype=torch.float64))
            sums[0] += float(decoder.sum())
            counts[0] += len(x0)
            parts.append((prior_term(x0, stage.process.schedule), total * ((num_steps - 1) / count), decoder))
    finally:
        module.train(was_training)
    if not parts:
        raise InputError("the variational bound needs at least one batch")
    prior, diffusion, decoder = (torch.cat(column) for column in zip(*parts))
    return VariationalBound(prior, diffusion, decoder, sums / counts)


def _terms(
    stage: Stage,
    x0: Tensor,
    conditioning: Conditioning,
    batch: Batch,
    k: Tensor,
    num_steps: int,
    variance: str,
    seed: int,
) -> Tensor:
    """(B,) L_t-1 of each image's step k (B,), L_0 where k is 0."""
    process = stage.process
    steps = k.to(torch.float32 if k.device.type == "mps" else torch.float64)
    t, s = (steps + 1) / num_steps, steps / num_steps
    epsilon = torch.empty_like(x0)
    for step in k.unique().tolist():
        noise = normal(seed, _STREAM + 1 + step, batch.positions[k == step], tuple(x0.shape[1:]))
        epsilon[k == step] = noise.to(x0.dtype)
    x_t = process.add_noise(x0, epsilon, t)
    output = stage.predict(x_t, t.to(x0.dtype), conditioning)
    if not process.learns_variance:
        estimate = process.x0(output, x_t, t)
        denoised = Denoised(estimate, torch.full_like(estimate, _FRACTIONS[variance]))
    else:
        denoised = process.denoised(output, x_t, t)
    return bound_terms(denoised, x0, t, s, process.schedule)
