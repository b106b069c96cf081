"""Sums and rows over processes. Every process calls, each gets the whole; without processes they change nothing.

Nothing here waits for a number of batches: a process that has seen no picture takes part with nothing.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_sum(values: Tensor) -> Tensor:
    """The sum of the processes' tensors, which must have one shape and dtype, on the device of `values`."""
    if num_processes() == 1:
        return values
    summed = values.detach().to(_device(), copy=True)
    dist.all_reduce(summed)
    return summed.to(values.device)


def all_rows(rows: Tensor) -> Tensor:
    """(N, …) of all processes' rows (N_r, …), in order of rank; N_r may differ and be 0, the rest of the shape not."""
    if num_processes() == 1:
        return rows
    device = _device()
    count = torch.tensor([len(rows)], device=device)
    counts = [torch.zeros_like(count) for _ in range(num_processes())]
    dist.all_gather(counts, count)
    sizes = [int(size) for size in counts]
    padded = torch.zeros(max(sizes), *rows.shape[1:], dtype=rows.dtype, device=device)
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes)]).to(rows.device)


def gather_by_position(rows: Tensor, positions: Tensor) -> Tensor:
    """(N, …) of all processes' rows in order of their positions, each position once.

    The result does not depend on how samples were dealt to processes; a sample that several processes measured, as a
    distributed sampler pads with, counts once.

    Args:
        rows: (N_r, …), of one dtype in all processes.
        positions: (N_r,) int64, the samples' numbers.

    Raises:
        ValueError: not one position a row.
    """
    if positions.shape != rows.shape[:1]:
        raise ValueError(f"{len(rows)} rows need as many positions, not {tuple(positions.shape)}")
    everyone, numbers = all_rows(rows), all_rows(positions.to(rows.device, torch.int64))
    order = numbers.argsort(stable=True)
    numbers = numbers[order]
    first = torch.ones_like(numbers, dtype=torch.bool)
    first[1:] = numbers[1:] != numbers[:-1]
    return everyone[order[first]]


class FeatureStore:
    """Features of the pictures seen so far, for what needs each of them rather than sums (KID, precision and recall).

    4 bytes a number: 8 KiB a picture at 2048 features.

    Args:
        num_features: D.
    """

    def __init__(self, num_features: int) -> None:
        self.num_features = num_features
        self._rows: list[Tensor] = []
        self._positions: list[Tensor] = []

    def __len__(self) -> int:
        """Pictures seen by this process."""
        return sum(map(len, self._rows))

    def update(self, features: Tensor, positions: Tensor) -> None:
        """Adds (B, D) features, kept as float32 in the main memory, of the samples numbered `positions` (B,)."""
        if features.ndim != 2 or features.shape[1] != self.num_features or positions.shape != features.shape[:1]:
            raise ValueError(
                f"a store of {self.num_features} features was given {tuple(features.shape)} and positions "
                f"{tuple(positions.shape)}"
            )
        self._rows.append(features.detach().float().cpu())
        self._positions.append(positions.detach().to("cpu", torch.int64))

    def gather(self) -> Tensor:
        """(N, D) float32 of all processes, by position, each sample once; every process must call."""
        empty = torch.zeros(0, self.num_features), torch.zeros(0, dtype=torch.int64)
        rows, positions = (torch.cat([nothing, *parts]) for nothing, parts in zip(empty, (self._rows, self._positions)))
        return gather_by_position(rows, positions)


def _device() -> torch.device:
    """Where the processes exchange tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
