"""What a stage has learned, beside its loss: whether it takes noise away, hears its text, and keeps colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from imagen_lightning.diffusion.random import Stream, normal
from imagen_lightning.images import downsample, to_float, to_uint8
from imagen_lightning.metrics.vlb import Stage
from imagen_lightning.types import Batch

LOW_TIMES = (0.05, 0.1, 0.15)
HIGH_TIMES = (0.5, 0.7, 0.9)


@torch.no_grad()
def x0_errors(stage: Stage, batches: Sequence[Batch], times: Sequence[float], seed: int) -> Tensor:
    """(N, T) float64 mean squared errors of the estimates of x0 at each time, on noise that (seed, position) fixes.

    Args:
        stage: in evaluation mode.
        batches: N images in all, of 8 bits.
        times: T times in (0, 1].
        seed: of the noise, and of what else the stage draws in `condition`.
    """
    device = next(stage.network.parameters()).device
    rows = []
    for batch in batches:
        x0, conditioning = stage.condition(batch.to(device), seed, training=False)
        epsilon = normal(seed, Stream.NOISE, batch.positions.to(device), tuple(x0.shape[1:]))
        errors = []
        for time in times:
            t = torch.full((len(x0),), time, device=device)
            x_t = stage.process.add_noise(x0, epsilon, t)
            estimate = stage.process.x0(stage.predict(x_t, t, conditioning), x_t, t)
            errors.append((estimate.float() - x0).cpu().double().square().mean((1, 2, 3)))
        rows.append(torch.stack(errors, 1))
    return torch.cat(rows)


def denoising_ratios(stage: Stage, batches: Sequence[Batch], seed: int) -> Tensor:
    """(N,) float64: the error at LOW_TIMES over that of the best linear estimate of a pixel from that pixel alone.

    The latter knows each channel's mean and variance over the images and leaves sigma^2 v / (alpha^2 v + sigma^2)
    (Wiener 1949): about what a network reaches that gives back its input. Below 1 something is known of images.

    Args:
        stage, batches, seed: see `x0_errors`.
    """
    errors = x0_errors(stage, batches, LOW_TIMES, seed)
    variance = _channel_variance(batches)
    t = torch.tensor(LOW_TIMES, dtype=torch.float64)
    alpha, sigma = (part(t).double()[:, None] for part in (stage.process.schedule.alpha, stage.process.schedule.sigma))
    alone = (sigma**2 * variance / (alpha**2 * variance + sigma**2)).mean(1)
    return (errors / alone).mean(1)


def _channel_variance(batches: Sequence[Batch]) -> Tensor:
    """(3,) float64, of all pixels in [-1, 1]."""
    count, sums = 0, torch.zeros(2, 3, dtype=torch.float64)
    for batch in batches:
        images = to_float(batch.images).double().cpu()
        sums += torch.stack([images.pow(power).sum((0, 2, 3)) for power in (1, 2)])
        count += images[:, 0].numel()
    mean, mean_square = sums / count
    return (mean_square - mean.square()).clamp(min=1e-12)


def text_gains(stage: Stage, batches: Sequence[Batch], seed: int) -> Tensor:
    """(M,) float64, whose mean is what the images' own captions save against others', as a share of the latter's error.

    Errors are means over HIGH_TIMES, where text decides most. Each image is given the caption that lies a fixed number
    of places further on; the M images whose captions differ from their own count. With true and false errors e and f
    the gain is g = 1 - mean(e) / mean(f), and an image's number g + ((1 - g) f - e) / mean(f): the spread of these is
    that of the ratio (the delta method), not that of the images' difficulty.

    Args:
        stage, batches, seed: see `x0_errors`; batches without stored text.
    """
    captions = [caption for batch in batches for caption in batch.captions]

    def rotated(places: int) -> list[str]:
        return captions[places:] + captions[:places]

    def num_changed(places: int) -> int:
        return sum(own != other for own, other in zip(captions, rotated(places)))

    others = rotated(max(range(1, len(captions)), key=num_changed, default=0))
    changed = torch.tensor([own != other for own, other in zip(captions, others)])
    rest = iter(others)
    shuffled = [replace(batch, captions=[next(rest) for _ in batch.captions]) for batch in batches]
    true, false = (x0_errors(stage, part, HIGH_TIMES, seed).mean(1)[changed] for part in (batches, shuffled))
    gain = 1 - true.mean() / false.mean()
    return gain + ((1 - gain) * false - true) / false.mean()


def z_score(numbers: Tensor) -> float:
    """The mean of N numbers, at least 2, in standard errors."""
    error = numbers.std() / len(numbers) ** 0.5
    return float(numbers.mean() / error.clamp(min=1e-12))


def colour_shift(images: Tensor, low_res: Tensor) -> Tensor:
    """(B,) float64: how far an output's colours lie from its input's, of 255.

    The mean over channels of the distance between the channel's means of the output, reduced to the input's size by
    the one area filter, and of the input.

    Args:
        images: (B, 3, H, W) uint8, a super-resolution stage's output.
        low_res: (B, 3, h, w) uint8, what it was given.
    """
    height, width = low_res.shape[-2:]
    reduced = to_uint8(downsample(to_float(images), (height, width))).double()
    return (reduced.mean((2, 3)) - low_res.double().mean((2, 3))).abs().mean(1)
