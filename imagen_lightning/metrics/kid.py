"""The kernel distance of two sets of features: KID where they are Inception's (Binkowski et al. 2018, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imagen_lightning.errors import InputError
from imagen_lightning.metrics.finite import check_finite

_BLOCK = 2048  # rows of a kernel matrix in memory at once
_LARGEST = 1000  # samples of a subset, as published


@dataclass(frozen=True)
class KernelDistance:
    """The squared maximum mean discrepancy over random subsets.

    Attributes:
        value: its mean over the subsets; unbiased, so that it may be negative where the sets are alike.
        std: its standard deviation over the subsets.
        num_subsets: how many.
        subset_size: samples of each set in a subset.
    """

    value: float
    std: float
    num_subsets: int
    subset_size: int

    @property
    def settings(self) -> str:
        """In words, for a protocol."""
        return f"{self.num_subsets} subsets of {self.subset_size}"


def kernel_distance(
    first: Tensor, second: Tensor, *, num_subsets: int = 100, subset_size: int | None = None, seed: int = 0
) -> KernelDistance:
    """MMD^2 with the kernel k(x, y) = (x.y / D + 1)^3, unbiased, in float64.

    Args:
        first: (N, D) features.
        second: (M, D) features.
        num_subsets: random subsets without repetition, the same for a seed.
        subset_size: samples of each set in one; default 1000, as published, or half of the smaller set where that is
            less, since subsets that hold nearly all samples do not spread.
        seed: of the subsets.

    Raises:
        InputError: subsets larger than a set or of fewer than 2 samples, no subsets, features that are not finite.
        ValueError: features that do not fit.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"features {tuple(first.shape)} and {tuple(second.shape)} have no kernel distance")
    fewest = min(len(first), len(second))
    size = min(_LARGEST, fewest // 2) if subset_size is None else subset_size
    if not 2 <= size <= fewest:
        raise InputError(
            f"a kernel distance of {len(first)} and {len(second)} samples cannot have subsets of {size}; "
            f"take at least 4 samples, or a subset size in 2..{fewest}"
        )
    if num_subsets < 1:
        raise InputError(f"a kernel distance needs at least 1 subset, not {num_subsets}")
    check_finite(first, second)
    generator = torch.Generator().manual_seed(seed)
    chosen = [
        [torch.randperm(n, generator=generator)[:size] for n in (len(first), len(second))] for _ in range(num_subsets)
    ]
    x, y = first.detach().double(), second.detach().to(first.device).double()
    # All kernels once serve every subset; where the sets are large beside the subsets, a kernel a subset is less work.
    if len(x) * len(y) <= num_subsets * size * size:
        in_x, in_y = (torch.zeros(len(rows), num_subsets, dtype=x.dtype, device=x.device) for rows in (x, y))
        for k, (rows, others) in enumerate(chosen):
            in_x[rows, k], in_y[others, k] = 1, 1
        distances = _distances(x, y, in_x, in_y, size)
    else:
        everyone = torch.ones(size, 1, dtype=x.dtype, device=x.device)
        distances = torch.cat([_distances(x[rows], y[others], everyone, everyone, size) for rows, others in chosen])
    return KernelDistance(float(distances.mean()), float(distances.std(correction=0)), num_subsets, size)


def _distances(x: Tensor, y: Tensor, in_x: Tensor, in_y: Tensor, size: int) -> Tensor:
    """(K,) MMD^2 of K subsets of `size` rows of x (N, D) and y (M, D); members have 1 in in_x (N, K) and in_y (M, K).

    eq. 4 of Binkowski et al. 2018.
    """
    within = _sums(x, x, in_x, in_x) + _sums(y, y, in_y, in_y) - _diagonal(x) @ in_x - _diagonal(y) @ in_y
    return within / (size * (size - 1)) - 2 * _sums(x, y, in_x, in_y) / size**2


def _sums(x: Tensor, y: Tensor, in_x: Tensor, in_y: Tensor) -> Tensor:
    """(K,) sums of the kernel over the pairs of each subset's members."""
    total = torch.zeros_like(in_x[0])
    for rows, members in zip(x.split(_BLOCK), in_x.split(_BLOCK)):
        kernel = (rows @ y.T / x.shape[1] + 1) ** 3
        total += (members * (kernel @ in_y)).sum(dim=0)
    return total


def _diagonal(x: Tensor) -> Tensor:
    """(N,) k(x, x)."""
    return (x.square().sum(dim=1) / x.shape[1] + 1) ** 3
