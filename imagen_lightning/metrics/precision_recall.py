"""How many pictures look real, and how much of what is real they cover (Kynkäänniemi et al. 2019, section 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imagen_lightning.errors import InputError
from imagen_lightning.metrics.finite import check_finite

_BLOCK = 1024  # rows of a distance matrix in memory at once


@dataclass(frozen=True)
class PrecisionRecall:
    """Which samples lie on the other set's manifold.

    Attributes:
        is_real: (N,) bool, generated samples within reach of a real one.
        is_covered: (M,) bool, real samples within reach of a generated one.
        num_neighbours: k, whose distance is a sample's reach.
    """

    is_real: Tensor
    is_covered: Tensor
    num_neighbours: int

    @property
    def precision(self) -> float:
        return self.is_real.double().mean().item()

    @property
    def recall(self) -> float:
        return self.is_covered.double().mean().item()


def precision_recall(generated: Tensor, real: Tensor, *, num_neighbours: int = 3) -> PrecisionRecall:
    """Improved precision and recall, in float64, blockwise: memory grows with the number of samples, not its square.

    A set's manifold is the union of the balls around its samples that reach their k-th neighbour in the set. Both
    numbers depend on how many samples there are of either set; compare values of one number only.

    Args:
        generated: (N, D) features.
        real: (M, D) features.
        num_neighbours: k.

    Raises:
        InputError: no more than k samples in a set, features that are not finite.
        ValueError: features that do not fit.
    """
    if generated.ndim != 2 or real.ndim != 2 or generated.shape[1] != real.shape[1]:
        raise ValueError(f"features {tuple(generated.shape)} and {tuple(real.shape)} cannot be compared")
    if not 1 <= num_neighbours < min(len(generated), len(real)):
        raise InputError(
            f"{num_neighbours} neighbours of {len(generated)} generated and {len(real)} real samples: "
            f"the number must be at least 1 and less than that of the samples"
        )
    check_finite(generated, real)
    x, y = generated.detach().double(), real.detach().to(generated.device).double()
    is_real, is_covered = _within(x, y, _reach(y, num_neighbours)), _within(y, x, _reach(x, num_neighbours))
    return PrecisionRecall(is_real.cpu(), is_covered.cpu(), num_neighbours)


def _reach(x: Tensor, k: int) -> Tensor:
    """(N,) squared distances of x (N, D) to the k-th neighbour, itself not counted."""
    return torch.cat([_squared(rows, x).topk(k + 1, dim=1, largest=False).values[:, -1] for rows in x.split(_BLOCK)])


def _within(x: Tensor, centres: Tensor, reach: Tensor) -> Tensor:
    """(N,) bool: x (N, D) lies in a ball around one of the centres (M, D) of squared radius reach (M,)."""
    return torch.cat([(_squared(rows, centres) <= reach).any(dim=1) for rows in x.split(_BLOCK)])


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """(N, M) squared distances."""
    # The common mean cancels: less of float64 is spent on it.
    origin = y.mean(dim=0)
    x, y = x - origin, y - origin
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp(min=0)
