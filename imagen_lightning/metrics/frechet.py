"""The Fréchet distance between Gaussians fitted to features: FID where they are Inception's, else FD of their name.

d^2 = |mu_1 - mu_2|^2 + tr(S_1) + tr(S_2) - 2 tr((S_1 S_2)^1/2)   (Dowson & Landau 1982; Heusel et al. 2017, eq. 6)

With S_1 = F F^T the eigenvalues of S_1 S_2 are those of the symmetric F^T S_2 F, so that no root of a product without
symmetry is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from imagen_lightning.errors import InputError
from imagen_lightning.metrics.distributed import all_sum
from imagen_lightning.metrics.finite import check_finite

_TINY = 1e-7  # a pivot that much smaller than the largest is rounding: its square is beyond float64
_BLOCK = 256  # columns of a triangular product at once


class FeatureMoments:
    """Number, mean and scatter of features seen so far, in float64.

    Batches, processes and files merge into what all samples together would give, but for rounding: kept are not the
    sums of products but the scatter around the mean (Chan, Golub & LeVeque 1979), which does not cancel where the mean
    is large beside the spread.

    Args:
        num_features: D.
        device: where the sums lie; features move there. A device without float64 (MPS) will not do.

    Attributes:
        count: samples seen.
        mean: (D,) float64.
        scatter: (D, D) float64, the sum of (x - mean)(x - mean)^T.
    """

    def __init__(self, num_features: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, features: Tensor) -> FeatureMoments:
        """Those of (N, D) features, on their device where it has float64."""
        moments = cls(features.shape[1], "cpu" if features.device.type == "mps" else features.device)
        moments.update(features)
        return moments

    @property
    def num_features(self) -> int:
        return len(self.mean)

    @property
    def covariance(self) -> Tensor:
        """(D, D), unbiased.

        Raises:
            InputError: fewer than two samples.
        """
        if self.count < 2:
            raise InputError(f"a covariance needs at least 2 samples, not {self.count}; take more")
        return self.scatter / (self.count - 1)

    def update(self, features: Tensor) -> None:
        """Adds (B, D) features; B may be 0.

        Raises:
            ValueError: another number of features.
            InputError: features that are not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise ValueError(f"moments of {self.num_features} features were given {tuple(features.shape)}")
        if not len(features):
            return
        rows = features.detach().to(self.mean.device, torch.float64)
        mean = rows.mean(dim=0)
        if not mean.isfinite().all():
            check_finite(rows)
        self._add(len(rows), mean)
        centred = rows - mean
        self.scatter.addmm_(centred.T, centred)

    def merge(self, other: FeatureMoments) -> None:
        """Adds all that `other` has seen."""
        if other.num_features != self.num_features:
            raise ValueError(f"moments of {self.num_features} features cannot take those of {other.num_features}")
        if other.count:
            self._add(other.count, other.mean.to(self.mean.device))
            self.scatter += other.scatter.to(self.scatter.device)

    def over_processes(self) -> FeatureMoments:
        """The moments of what all processes have seen; every process must call, also one that has seen nothing."""
        device = self.mean.device
        count = all_sum(torch.tensor([self.count], device=device))
        whole = FeatureMoments(self.num_features, device)
        whole.count = int(count)
        whole.mean = all_sum(self.count * self.mean) / max(whole.count, 1)
        offset = self.mean - whole.mean
        whole.scatter = all_sum(self.scatter + self.count * torch.outer(offset, offset))
        return whole

    def _add(self, count: int, mean: Tensor) -> None:
        """Counts samples in whose scatter around their own mean is added apart."""
        total = self.count + count
        offset = mean - self.mean
        self.scatter.addr_(offset, offset, alpha=self.count * count / total)
        self.mean = self.mean + offset * (count / total)
        self.count = total


def frechet_distance(first: FeatureMoments, second: FeatureMoments) -> float:
    """d^2 between the Gaussians with the two moments.

    Below D + 1 samples a covariance is singular and the distance mostly measures their number: compare values of one
    number of samples only.

    Raises:
        InputError: fewer than two samples in either.
        ValueError: moments of different numbers of features.
    """
    few, many = sorted((first, second), key=lambda moments: moments.count)
    # A covariance of n samples has rank n - 1 at most; what further eigenvalues show is rounding.
    rank = min(few.count - 1, few.num_features)
    one, other = (many, few) if many.count > many.num_features else (few, many)
    return gaussian_frechet_distance(one.mean, one.covariance, other.mean, other.covariance, rank)


def gaussian_frechet_distance(
    mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor, rank: int | None = None
) -> float:
    """d^2 between N(mean_1, covariance_1) and N(mean_2, covariance_2).

    Args:
        mean_1: (D,).
        covariance_1: (D, D), symmetric positive semi-definite. It is factored, which is fast where it has full rank.
        mean_2: (D,).
        covariance_2: (D, D).
        rank: an upper bound on the rank of either covariance, where one is known.

    Raises:
        ValueError: shapes that do not fit.
    """
    if mean_1.shape != mean_2.shape or covariance_1.shape != covariance_2.shape or mean_1.ndim != 1:
        raise ValueError(f"Gaussians of {tuple(mean_1.shape)} and {tuple(mean_2.shape)} features have no distance")
    mean_1, covariance_1, mean_2, covariance_2 = (
        value.double() for value in (mean_1, covariance_1, mean_2, covariance_2.to(covariance_1.device))
    )
    # (S_1 S_2)^1/2 has the trace of (F^T S_2 F)^1/2; eigenvalues come in ascending order.
    lower = _cholesky(covariance_1)
    if lower is None:
        factor = _root(covariance_1)
        product = factor.T @ covariance_2 @ factor
    else:
        product = _congruent(lower, covariance_2)
    squares = torch.linalg.eigvalsh(product).clamp(min=0)
    cross = squares[-rank:].sqrt().sum() if rank else squares.sqrt().sum()
    distance = (mean_1 - mean_2.to(mean_1.device)).square().sum() + covariance_1.trace() + covariance_2.trace()
    return max(float(distance - 2 * cross), 0.0)


def factored(covariance: Tensor) -> Tensor:
    """F (D, R) with F F^T = covariance (D, D): Cholesky's, or by eigenvalues where the covariance is singular."""
    lower = _cholesky(covariance)
    return _root(covariance) if lower is None else lower


def _cholesky(covariance: Tensor) -> Tensor | None:
    """Lower triangular, or None where the covariance is singular."""
    lower, failed = torch.linalg.cholesky_ex(covariance)
    pivots = lower.diagonal()
    return None if failed or pivots.min() <= _TINY * pivots.max() else lower


def _root(covariance: Tensor) -> Tensor:
    """(D, R) without the directions that the covariance has not."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


def _congruent(lower: Tensor, covariance: Tensor) -> Tensor:
    """The lower half of L^T S L, all that `eigvalsh` reads, without the products with L's zeros."""
    half, result = torch.empty_like(covariance), torch.zeros_like(covariance)
    starts = range(0, len(covariance), _BLOCK)
    for start in starts:
        block = slice(start, start + _BLOCK)
        half[:, block] = covariance[:, start:] @ lower[start:, block]
    for start in starts:
        block = slice(start, start + _BLOCK)
        result[block, : start + _BLOCK] = lower[start:, block].T @ half[start:, : start + _BLOCK]
    return result


def frechet_influence(features: Tensor, reference: FeatureMoments) -> Tensor:
    """How much each of N pictures pulls the distance from the reference: (N,) float64 with mean 0.

    The first-order change of d^2 per unit of a sample's weight (its empirical influence function); the standard error
    of d^2 is their standard deviation over sqrt(N). Resampling the distance itself will not do: each resample has fewer
    distinct pictures, which shifts d^2 upward by several times its spread.

    Args:
        features: (N, D) of the pictures measured, N at least 2.
        reference: moments of the reference.
    """
    rows = features.detach().to(reference.mean.device, torch.float64)
    mean = rows.mean(dim=0)
    centred = rows - mean
    # tr((S_1 S_2)^1/2) = tr(M^1/2), M = B B^T with one row of B a picture. Weighing picture i by 1 + w changes it by
    # w/2 (M^1/2)_ii.
    scaled = centred @ factored(reference.covariance) / len(rows) ** 0.5
    if scaled.shape[0] <= scaled.shape[1]:
        squares, vectors = torch.linalg.eigh(scaled @ scaled.T)
        diagonal = (vectors.square() * squares.clamp(min=0).sqrt()).sum(dim=1)
    else:
        squares, vectors = torch.linalg.eigh(scaled.T @ scaled)
        # [-1:] since a constant reference spans no direction at all: its covariance pulls nothing.
        kept = squares > len(squares) * torch.finfo(squares.dtype).eps * squares[-1:]
        diagonal = ((scaled @ vectors[:, kept]).square() / squares[kept].sqrt()).sum(dim=1)
    pulls = 2 * (centred @ (mean - reference.mean)) + centred.square().sum(dim=1) - len(rows) * diagonal
    return pulls - pulls.mean()
