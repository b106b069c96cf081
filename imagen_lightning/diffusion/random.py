"""Random numbers that are a pure function of (seed, stream, position).

Training noise, times, text drops, augmentation levels and crops come from here, so that they depend neither on the
batch's size nor on workers or processes, and a resumed run needs no generator's state. The generator is Philox4x32-10
(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), a counter-based one, in int64 tensor arithmetic on
any device.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


class Stream(IntEnum):
    """What a number is drawn for; two streams never share numbers."""

    NOISE = 0
    TIME = 1
    TEXT_DROP = 2
    AUG_LEVEL = 3
    AUG_NOISE = 4
    CROP = 5


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four int64 tensors of 32 random bits each, from four counter words (int64, 32 bits used) and two key words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0 = c0 * 0xD2511F53
        p1 = c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def random_bits(seed: int, stream: int, positions: Tensor, count: int) -> Tensor:
    """(B, count) int64 tensor of 32 random bits each, on positions' device."""
    blocks = torch.arange((count + 3) // 4, device=positions.device)[None, :].expand(len(positions), -1)
    low = (positions & _MASK)[:, None].expand_as(blocks)
    high = ((positions >> 32) & _MASK)[:, None].expand_as(blocks)
    words = philox((blocks, torch.full_like(blocks, int(stream)), low, high), (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def uniform(seed: int, stream: int, positions: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """(B, *shape) float32, uniform in (0, 1)."""
    bits = random_bits(seed, stream, positions, math.prod(shape))
    return _centres(bits >> 9).view(len(positions), *shape)


def _centres(bits: Tensor) -> Tensor:
    """23 random bits to float32 in (0, 1). Not 24: the largest of those, with its half, would round to 1."""
    return (bits.float() + 0.5) * 2.0**-23


def normal(seed: int, stream: int, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B, *shape) float32, standard normal (Box & Muller 1958)."""
    count = math.prod(shape)
    u = uniform(seed, stream, positions, (2 * ((count + 1) // 2),))
    radius = torch.sqrt(-2 * torch.log(u[:, 0::2]))
    angle = 2 * math.pi * u[:, 1::2]
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs.flatten(1)[:, :count].reshape(len(positions), *shape)


def spread_uniform(seed: int, stream: int, positions: Tensor) -> Tensor:
    """(B,) float32 in (0, 1): neighbouring positions are spread evenly, for times with little variance in a batch.

    A Kronecker sequence, frac(u0 + position * golden ratio), with u0 drawn from the seed; it does for any batch size
    what the low-discrepancy sampler of Kingma et al. 2021 (appendix I.1) does for one.
    """
    high, low = random_bits(seed, stream, torch.zeros(1, dtype=torch.int64), 2)[0].tolist()
    golden = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, as a signed int64; products wrap as they should
    start = (high << 32 | low) - (1 << 63)
    return _centres((positions * golden + start) >> 41 & 0x7FFFFF)


def seeded_generator(seed: int, image: int, stage: int) -> torch.Generator:
    """The generator of image `image` (counted over batches and processes) in stage `stage` of a cascade, on the CPU."""
    words = random_bits(seed, 1000 + stage, torch.tensor([image]), 2)[0].tolist()
    return torch.Generator().manual_seed(words[0] << 31 ^ words[1])
