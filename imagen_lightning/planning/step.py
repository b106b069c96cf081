"""One training step of a stage, as the trainer takes it: with real tensors, or with such as have shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from imagen_lightning.planning.kernels import Device, Kernels
from imagen_lightning.planning.live import BLOCK, Live
from imagen_lightning.types import Batch, InputError, Text


@dataclass(frozen=True)
class Precision:
    """Lightning's `trainer.precision`.

    Attributes:
        name: as it is written there.
        weights: what they are held in.
        autocast: what torch.autocast computes with, or None.
    """

    name: str
    weights: torch.dtype
    autocast: torch.dtype | None = None


PRECISIONS = {
    name: Precision(name, weights, autocast)
    for name, weights, autocast in (
        ("32-true", torch.float32, None),
        ("32", torch.float32, None),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("bf16", torch.float32, torch.bfloat16),
        ("16-mixed", torch.float32, torch.float16),
        ("16", torch.float32, torch.float16),
        ("bf16-true", torch.bfloat16, None),
        ("16-true", torch.float16, None),
        ("64-true", torch.float64, None),
        ("64", torch.float64, None),
    )
}


def find_precision(name: Any) -> Precision:
    """Raises InputError for one that cannot be planned."""
    found = PRECISIONS.get("32-true" if name is None else str(name))
    if found is None:
        raise InputError(f"precision {name!r} cannot be planned; use one of {', '.join(PRECISIONS)}")
    return found


@dataclass(frozen=True)
class StepMemory:
    """What a step holds beside weights, average and optimizer state; bytes.

    Attributes:
        gradients: of the trained parameters.
        copies: of the weights, in the precision of autocast, kept for the backward pass.
        activations: what else the forward pass keeps for the backward pass.
        peak: the most that was held at once, with all of these.
        flops: of forward and backward, with what is computed again.
    """

    gradients: int
    copies: int
    activations: int
    peak: int
    flops: int


def example_batch(stage: Any, num_images: int, num_tokens: int, device: torch.device | str) -> Batch:
    """A batch of that shape without content, its text as an encoder gives it."""
    size = stage.image_size
    images = torch.zeros(num_images, 3, size, size, dtype=torch.uint8, device=device)
    names = [str(number) for number in range(num_images)]
    text = empty = None
    if stage.text.encoder is not None:
        text = _example_text(stage.text.encoder, num_images, num_tokens, device)
        empty = _example_text(stage.text.encoder, 1, 1, device)
    return Batch(images, names, names, torch.arange(num_images, device=device), text, empty)


def _example_text(encoder: Any, num_captions: int, num_tokens: int, device: torch.device | str) -> Text:
    states = torch.zeros(num_captions, num_tokens, encoder.dim, device=device)
    attended = getattr(encoder, "padding", "masked") == "attended"
    mask = None if attended else torch.ones(num_captions, num_tokens, dtype=torch.bool, device=device)
    return Text(states, mask, torch.zeros(num_captions, encoder.dim, device=device))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def forward_loss(stage: Any, batch: Batch, precision: Precision, device_type: str) -> Tensor:
    """The loss as `training_step` gives it, in the trainer's forward context."""
    mixed = nullcontext() if precision.autocast is None else torch.autocast(device_type, precision.autocast)
    true = nullcontext() if precision.weights == torch.float32 else default_dtype(precision.weights)
    if precision.weights != torch.float32:
        batch = batch.to(precision.weights)
    with mixed, true:
        x0, conditioning = stage.condition(batch, stage.seed, training=True)
        losses, _ = stage.diffusion_loss(x0, conditioning, batch.positions, stage.seed)
        return losses.mean()


def simulate(
    stage: nn.Module, precision: Precision, num_images: int, num_tokens: int, accumulate: bool, device: Device
) -> StepMemory:
    """A step of a stage whose parameters lie on the meta device; it is left as it is.

    Gradients of the step before lie there during the forward pass, since the trainer frees them after it.

    Args:
        stage: made inside `without_weights`.
        precision: of weights and computation.
        num_images, num_tokens: of the batch that one process takes at once.
        accumulate: whether gradients are summed over several batches.
        device: whose kernels to follow.
    """
    stage = on_meta(stage, precision)
    kernels, live = Kernels(device), Live(BLOCK if device == "cuda" else 1)
    with kernels, live:
        weights = live.hold([*stage.parameters(), *stage.buffers()])
        trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        gradients = live.now - weights
        batch = example_batch(stage, num_images, num_tokens, "meta")
        live.restart()
        with kernels.forward_pass():
            loss = forward_loss(stage, batch, precision, "cpu")
        kept, copies = live.now - weights - gradients, kernels.copied_bytes()
        if not accumulate:
            for parameter in trained:
                parameter.grad = None
        torch.autograd.backward([loss])  # not loss.backward(), which a function mode would hide from itself
        return StepMemory(gradients, copies, kept - copies, live.peak - weights, live.flops)


def on_meta(stage: nn.Module, precision: Precision) -> Any:
    """A copy of the stage in the precision of its weights, buffers on the meta device too."""
    stage = deepcopy(stage).train()
    for module in stage.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer.to("meta") if buffer is not None else None
    return stage.to(precision.weights) if precision.weights != torch.float32 else stage
