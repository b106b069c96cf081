"""Means over the steps since they were last logged and over all processes, without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Means:
    """Mean of the numbers in each of some bins since `take` was last called.

    Sums and counts stay on the numbers' device in float64 (float32 where the device lacks it).

    Args:
        num_bins: how many bins.

    Attributes:
        totals: (2, num_bins) sums and counts of this process; None before the first number.
    """

    def __init__(self, num_bins: int = 1) -> None:
        self.num_bins = num_bins
        self.totals: Tensor | None = None

    def add(self, numbers: Tensor, bins: Tensor | None = None, weight: float = 1.0) -> None:
        """Adds (B,) numbers to their (B,) bins, by default all to the first; each counts `weight` times."""
        dtype = torch.float32 if numbers.device.type == "mps" else torch.float64
        bins = torch.zeros_like(numbers, dtype=torch.int64) if bins is None else bins
        new = torch.zeros(2, self.num_bins, dtype=dtype, device=numbers.device)
        new[0].index_add_(0, bins, numbers.detach().to(dtype) * weight)
        new[1].index_add_(0, bins, torch.full_like(numbers, weight, dtype=dtype))
        self.totals = new if self.totals is None else self.totals.to(new.device) + new

    def take(self, strategy: Any, device: torch.device) -> Tensor:
        """Return the (2, num_bins) sums and counts over all processes, and begin again.

        Every process must call, also one that added nothing.

        Args:
            strategy: the trainer's.
            device: of the process.
        """
        own, self.totals = self._totals_on(device), None
        return strategy.reduce(own, reduce_op="sum")

    def parts(self, strategy: Any) -> Tensor:
        """Return all P processes' totals (P, 2, num_bins) on the CPU, for `restore`; every process must call."""
        own = self._totals_on(strategy.root_device)
        return strategy.all_gather(own).reshape(-1, 2, self.num_bins).cpu()

    def restore(self, parts: Tensor, rank: int, num_processes: int) -> None:
        """Continue from the (P, 2, num_bins) totals of the P processes of an earlier run.

        With as many processes each continues its own sums, so that rounding is the uninterrupted run's; with another
        number the first continues all of them. Totals of another number of bins are left out.
        """
        if parts.shape[1:] != (2, self.num_bins):
            return
        if len(parts) == num_processes:
            self.totals = parts[rank]
        else:
            self.totals = parts.sum(dim=0) if rank == 0 else None

    def _totals_on(self, device: torch.device) -> Tensor:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        empty = torch.zeros(2, self.num_bins, dtype=dtype, device=device)
        return empty if self.totals is None else self.totals.to(device)
