"""What a stage's frozen text encoder takes beside the stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from imagen_lightning.text import T5TextEncoder


@dataclass(frozen=True)
class EncoderCost:
    """A frozen text encoder's.

    Attributes:
        name: it goes by.
        parameters: of it.
        weights: bytes.
        flops: for one caption of the most tokens.
        kept: about the bytes that one caption keeps where gradients go through the encoder (textual inversion).
        known: whether the encoder is of a kind whose size can be told.
    """

    name: str
    parameters: int
    weights: int
    flops: int = 0
    kept: int = 0
    known: bool = True


def encoder_cost(encoder: Any, num_tokens: int) -> EncoderCost | None:
    """None for a stage without text; loads no weights.

    Raises:
        InputError: the config.json of a T5 that is neither published nor at hand.
    """
    if encoder is None:
        return None
    if isinstance(encoder, T5TextEncoder):
        shape, size = encoder.shape, torch.finfo(getattr(torch, encoder.dtype)).bits // 8
        count = shape.num_parameters
        kept = size * shape.kept_numbers(num_tokens)
        return EncoderCost(encoder.name, count, size * count, shape.flops(num_tokens), kept)
    name = encoder.name
    if isinstance(encoder, nn.Module):
        parameters = list(encoder.parameters())
        count = sum(parameter.numel() for parameter in parameters)
        return EncoderCost(name, count, sum(p.numel() * p.element_size() for p in parameters), known=False)
    is_own = type(encoder).__module__.startswith("imagen_lightning.")
    return EncoderCost(name, 0, 0, known=is_own)  # TinyTextEncoder has none
