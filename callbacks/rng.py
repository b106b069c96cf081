"""The global random states, as plain data that a checkpoint may hold and `torch.load(weights_only=True)` reads."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def rng_states(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators, and of `device`'s where it is a CUDA device."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002
    name, words, *rest = numpy_state
    states = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(words.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.device(device).type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_states(states: dict[str, Any], device: torch.device | str = "cpu") -> None:
    """Sets what `rng_states` returned; a CUDA state is ignored where `device` is no CUDA device."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"].cpu())
    if "cuda" in states and torch.device(device).type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


@contextmanager
def untouched_rng(device: torch.device | str = "cpu") -> Iterator[None]:
    """Whatever is drawn inside, the global generators go on as if it had not been."""
    states = rng_states(device)
    try:
        yield
    finally:
        set_rng_states(states, device)
