"""What samplers share: noise from one or many generators, times for a batch, alpha and sigma at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from imagen_lightning.types import Generator, InputError, Schedule


def noise_like(x: Tensor, generator: Generator | None) -> Tensor:
    """Standard normal noise of x's shape; with one generator an image, image i's noise comes from generator i alone."""
    if isinstance(generator, Sequence):
        if len(generator) != len(x):
            raise InputError(f"{len(generator)} generators for {len(x)} images; pass one, or one an image")
        rows = [torch.randn(x.shape[1:], generator=g, device=g.device, dtype=x.dtype) for g in generator]
        return torch.stack(rows).to(x.device)
    device = generator.device if generator is not None else x.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


def steps(times: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (t, s) of 0-d float64 times, from each time to the next smaller one.

    Raises:
        InputError: fewer than two times, times that do not decrease or lie outside [0, 1].
    """
    times = times.detach().to("cpu", torch.float64)
    if times.dim() != 1 or len(times) < 2:
        raise InputError(f"sampling needs at least two times, got {times.tolist()}")
    if not bool((times[1:] < times[:-1]).all()) or times[0] > 1 or times[-1] < 0:
        raise InputError(f"sampling times must decrease within [0, 1], got {times.tolist()}")
    yield from pairwise(times)


def level(schedule: Schedule, t: Tensor) -> tuple[float, float]:
    """alpha(t) and sigma(t) of a 0-d float64 time, as numbers."""
    return float(schedule.alpha(t)), float(schedule.sigma(t))


def time_at(schedule: Schedule, what: str) -> Callable[[Tensor], Tensor]:
    """The schedule's inverse of its log-SNR.

    Raises:
        InputError: it has none; `what` needs it.
    """
    inverse = getattr(schedule, "time_at", None)
    if inverse is None:
        raise InputError(f"{what} needs a schedule with time_at(log_snr); {type(schedule).__name__} has none")
    return inverse


def batch_time(t: Tensor, x: Tensor) -> Tensor:
    """The 0-d time t as (B,) in x's dtype (float32 at least), on its device."""
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    return t.to(x.device, dtype).expand(len(x))
