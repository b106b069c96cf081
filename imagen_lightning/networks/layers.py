"""Blocks that the networks are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from imagen_lightning.types import InputError


class SiLU(nn.Module):
    """x sigmoid(x), in the memory of x where no gradient is asked for (with one, x would be copied first)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=not torch.is_grad_enabled())


def activation(name: str) -> nn.Module:
    """The layer that "silu" or "gelu" names, for maps and vectors that nobody else holds.

    Raises:
        InputError: any other name.
    """
    if name not in ("silu", "gelu"):
        raise InputError(f"activation {name!r} is unknown; use 'silu' or 'gelu'")
    return SiLU() if name == "silu" else nn.GELU()


def add(x: Tensor, h: Tensor) -> Tensor:
    """x + h, in the memory of h: a map that nobody else holds and no gradient needs."""
    return h.add_(x) if h.dtype == x.dtype else x + h


class _Recomputation:
    """How activations are computed again; no context variable, since torch.compile reads it too."""

    contexts: Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]] | None = noop_context_fn


@contextmanager
def nothing_recomputed() -> Iterator[None]:
    """Inside, all activations are kept: where the FLOPs are counted of the work that must be done."""
    before, _Recomputation.contexts = _Recomputation.contexts, None
    try:
        yield
    finally:
        _Recomputation.contexts = before


@contextmanager
def recomputed_within(context: AbstractContextManager[Any]) -> Iterator[None]:
    """What is computed inside is computed again within `context`: a mode of torch that backward passes do not keep."""
    before, _Recomputation.contexts = _Recomputation.contexts, lambda: (nullcontext(), context)
    try:
        yield
    finally:
        _Recomputation.contexts = before


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), whose activations are computed again in the backward pass instead of kept (Chen et al. 2016).

    Random numbers, as dropout's, are the same both times. Inside `nothing_recomputed` activations are kept.
    """
    contexts = _Recomputation.contexts
    if not torch.is_grad_enabled() or contexts is None:
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)  # type: ignore[return-value]


def sinusoidal(time: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """(B,) times to (B, dim): cosines then sines of geometric frequencies (Vaswani et al. 2017; Ho et al. 2020)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=time.device, dtype=torch.float32) / half)
    angles = time.float()[:, None] * frequencies
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class TimeEmbedding(nn.Module):
    """A time, or an augmentation level times 1000, to the embedding that conditions every block."""

    def __init__(self, channels: int, dim: int, act: str = "silu") -> None:
        super().__init__()
        self.channels = channels
        self.net = nn.Sequential(nn.Linear(channels, dim), activation(act), nn.Linear(dim, dim))

    def forward(self, time: Tensor) -> Tensor:
        features = sinusoidal(time, self.channels)
        return self.net(features.to(next(self.net.parameters()).dtype))


class ResidualBlock(nn.Module):
    """Norm, activation, convolution, twice; the time scales and shifts the second norm (Dhariwal & Nichol 2021).

    Args:
        in_channels, out_channels: of the feature map.
        time_dim: of the embedding.
        resample: "down" or "up" halves or doubles the map inside the block, "none" keeps it.
        groups: of the normalisations.
        dropout: before the second convolution.
        act: "silu" or "gelu".
        eps: of the normalisations.
        scale: what the sum of shortcut and branch is divided by.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_dim: int,
        resample: str = "none",
        groups: int = 32,
        dropout: float = 0.0,
        act: str = "silu",
        eps: float = 1e-5,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.scale = scale
        self.activation = activation(act)
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def _resample(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, C, H, W) and the activated embedding (B, time_dim)."""
        h = self.conv1(self._resample(self.activation(self.norm1(x))))
        scale, shift = self.time(embedding)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        h = add(self.shortcut(self._resample(x)), self.conv2(self.dropout(self.activation(h))))
        return h if self.scale == 1 else h.div_(self.scale)


class NearestUp(nn.Conv2d):
    """Doubles a map by repeating its pixels, then convolves it: no checkerboard (Odena et al. 2016)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class PixelShuffleUp(nn.Conv2d):
    """Convolves a map into four times the channels, which become 2 x 2 pixels (Shi et al. 2016).

    The four pixels begin equal (ICNR, Aitken et al. 2017), hence without a checkerboard.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, 4 * out_channels, 3, padding=1)
        with torch.no_grad():
            for parameter in (self.weight, self.bias):
                assert parameter is not None
                parameter.copy_(parameter[::4].repeat_interleave(4, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(super().forward(x), 2)


class TransposedUp(nn.ConvTranspose2d):
    """Doubles a map by a transposed convolution of 4 x 4, a multiple of its stride: each pixel gets as many taps."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 4, stride=2, padding=1)
