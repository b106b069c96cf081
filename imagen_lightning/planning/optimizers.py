"""What any optimizer keeps: measured with tensors without memory, or by one real step of small parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from imagen_lightning.components import class_path
from imagen_lightning.planning.kernels import Device, Kernels
from imagen_lightning.planning.live import Live, num_bytes
from imagen_lightning.types import InputError

LARGEST = 65536  # elements of a parameter that is really made


@dataclass(frozen=True)
class OptimizerMemory:
    """What an optimizer holds; bytes.

    Attributes:
        name: of its class.
        state: between steps.
        working: beside that at the peak of a step; None where it is not known.
        how: it was measured.
    """

    name: str
    state: int
    working: int | None
    how: str


def optimizer_memory(stage: Any, device: Device) -> OptimizerMemory:
    """Of the stage's optimizer and trained parameters; the stage, on the meta device, is left as it is.

    Raises:
        InputError: the optimizer can neither be made nor stepped.
    """
    trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    try:
        return _on_meta(stage, trained, device)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        # As compiled kernels are, of no use without memory. Which error it was is said beside the figure.
        made = _by_a_real_step(stage.optimization.optimizer, trained)
        return replace(made, how=f"{made.how}, as it fails on the meta device: {type(error).__name__}")
    finally:
        for parameter in trained:
            parameter.grad = None


def _on_meta(stage: Any, trained: list[nn.Parameter], device: Device) -> OptimizerMemory:
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    with Kernels(device), Live() as live:
        optimizer = stage.optimization.make(stage)
        if device == "cuda":
            _as_on_a_gpu(optimizer)
        live.hold([*trained, *(parameter.grad for parameter in trained if parameter.grad is not None)])
        optimizer.step()
        before = live.now
        live.restart()
        optimizer.step()
        state = num_bytes(_state(optimizer))
        return OptimizerMemory(class_path(optimizer), state, live.peak - before, "its state made on the meta device")


def _as_on_a_gpu(optimizer: torch.optim.Optimizer) -> None:
    """torch's optimizers take all parameters at once on a GPU where nothing else is said, but for Adafactor."""
    for group in optimizer.param_groups:
        unsaid = group.get("foreach", False) is None and not group.get("fused")
        if unsaid and not isinstance(optimizer, torch.optim.Adafactor):
            group["foreach"] = True


def _by_a_real_step(factory: Any, trained: Iterable[nn.Parameter]) -> OptimizerMemory:
    """Each shape of parameter, made smaller where it is large, and its state scaled back."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counts: dict[tuple[tuple[int, ...], torch.dtype], int] = {}
    for parameter in trained:
        key = (tuple(parameter.shape), parameter.dtype)
        counts[key] = counts.get(key, 0) + 1
    made = {key: nn.Parameter(torch.zeros(_smaller(key[0]), dtype=key[1], device=device)) for key in counts}
    generator = torch.Generator().manual_seed(0)
    for parameter in made.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
    try:
        optimizer = factory(list(made.values()))
        optimizer.step()
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"optimizer {getattr(factory, '__name__', factory)}: one step fails ({error})") from error
    state = 0.0
    for (shape, _), parameter in zip(counts, made.values()):
        held = num_bytes(_tensors(optimizer.state.get(parameter, {})))
        state += counts[shape, parameter.dtype] * held * math.prod(shape) / max(parameter.numel(), 1)
    return OptimizerMemory(class_path(optimizer), round(state), None, "by a real step of small parameters")


def _smaller(shape: tuple[int, ...]) -> tuple[int, ...]:
    """At most LARGEST elements: the larger sides halved until it is."""
    sides = list(shape)
    while math.prod(sides) > LARGEST:
        largest = sides.index(max(sides))
        sides[largest] = -(-sides[largest] // 2)
    return tuple(sides)


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return _tensors(list(optimizer.state.values()))


def _tensors(state: Any) -> list[Tensor]:
    return [value for value in tree_leaves(state) if isinstance(value, Tensor)]
