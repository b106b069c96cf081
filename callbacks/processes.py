"""What the processes of a run tell each other while a checkpoint is made."""

from __future__ import annotations

from typing import Any

import torch


def of_all_processes(own: Any) -> list[Any]:
    """Every process's plain data, in the order of their ranks; all processes call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, own)
    return everyone
