"""Texts of different lengths in one batch."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from imagen_lightning.types import Text


def pad_text(text: Text, length: int) -> Text:
    """The text with states and mask padded to `length` tokens; a mask is made where there was none."""
    missing = length - text.states.shape[1]
    if missing <= 0:
        return text
    mask = text.mask
    if mask is None:
        mask = torch.ones(text.states.shape[:2], dtype=torch.bool, device=text.states.device)
    return Text(F.pad(text.states, (0, 0, 0, missing)), F.pad(mask, (0, missing)), text.pooled)


def _aligned(first: Text, second: Text) -> tuple[Text, Text]:
    length = max(first.states.shape[1], second.states.shape[1])
    first, second = pad_text(first, length), pad_text(second, length)
    if (first.mask is None) != (second.mask is None):
        mask = torch.ones((1, length), dtype=torch.bool, device=first.states.device)
        fill = [t if t.mask is not None else replace(t, mask=mask.expand(len(t), -1)) for t in (first, second)]
        first, second = fill
    return first, second


def join_texts(first: Text, second: Text) -> Text:
    """The rows of both, one after the other."""
    first, second = _aligned(first, second)
    mask = torch.cat([first.mask, second.mask]) if first.mask is not None and second.mask is not None else None
    return Text(torch.cat([first.states, second.states]), mask, torch.cat([first.pooled, second.pooled]))


def replace_texts(text: Text, other: Text, where: Tensor) -> Text:
    """The B texts with those at `where` (B, bool) replaced by `other`, one text for all."""
    text, other = _aligned(text, other)
    mask = None
    if text.mask is not None and other.mask is not None:
        mask = torch.where(where[:, None], other.mask, text.mask)
    states = torch.where(where[:, None, None], other.states.to(text.states.dtype), text.states)
    return Text(states, mask, torch.where(where[:, None], other.pooled.to(text.pooled.dtype), text.pooled))
