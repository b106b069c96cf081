"""Text states in memory: each caption is encoded once, and the encoder's weights are given back."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imagen_lightning.text.common import masked_mean
from imagen_lightning.types import InputError, Text, TextEncoder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Entry:
    """One caption's states (n, D) without padding, on the CPU, and the length that the encoder pads them to."""

    states: Tensor
    length: int
    masked: bool


class KeptStates:
    """Called as its encoder is, and gives what that gives: the states of a batch to the bit for an encoder whose states
    do not depend on a caption's neighbours, else to rounding.

    Each caption is encoded alone, so that its states depend on nothing else and a resumed run has the same. One that
    was not kept beforehand has the weights loaded again, and given back.

    Args:
        encoder: frozen.
        max_bytes: what the states may take in memory.
        device: where the encoder runs; None runs it where the states are asked for.
    """

    def __init__(self, encoder: TextEncoder, max_bytes: int = 2**32, device: torch.device | str | None = None) -> None:
        self.encoder = encoder
        self.max_bytes = max_bytes
        self.device = device
        self._entries: dict[str, _Entry] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptStates:
        return self  # EMA deep-copies the stage; what is frozen is shared instead

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        """Size of the states in memory."""
        return sum(entry.states.numel() * entry.states.element_size() for entry in self._entries.values())

    def keep(self, captions: Iterable[str], device: torch.device | str = "cpu") -> int:
        """Encodes those captions that are not there yet, then frees the encoder; returns their number.

        Raises:
            InputError: the states would take more than `max_bytes`.
        """
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._entries]
        if not new:
            return 0
        self._check_room(new)
        place = device if self.device is None else self.device
        try:
            for caption in new:
                text = self.encoder([caption], place)
                mask = torch.ones(text.states.shape[1], dtype=torch.bool) if text.mask is None else text.mask[0].cpu()
                states = text.states[0].cpu()[mask].clone()
                self._entries[caption] = _Entry(states, len(mask), text.mask is not None)
        finally:
            self.encoder.free()
        return len(new)

    def __call__(self, captions: Sequence[str], device: torch.device | str = "cpu") -> Text:
        """The states of B captions, padded as the encoder pads them."""
        if missing := [caption for caption in captions if caption not in self._entries]:
            log.warning("the text encoder is loaded again for a caption that was not kept: %r", missing[0])
            self.keep(missing, device)
        entries = [self._entries[caption] for caption in captions]
        length = max(entry.length for entry in entries)
        states = torch.zeros(len(entries), length, entries[0].states.shape[1])
        mask = torch.zeros(len(entries), length, dtype=torch.bool)
        for row, entry in enumerate(entries):
            states[row, : len(entry.states)] = entry.states
            mask[row, : len(entry.states)] = True
        moved = states.to(device)
        kept = mask.to(device) if any(entry.masked for entry in entries) else None
        return Text(moved, kept, masked_mean(moved, kept))

    def _check_room(self, captions: Sequence[str]) -> None:
        size = 4 * self.encoder.dim * sum(self.encoder.num_tokens(captions)) + self.num_bytes
        if size > self.max_bytes:
            raise InputError(
                f"the text states of {len(captions)} captions take {size / 2**30:.2f} GiB in memory, more than the "
                f"{self.max_bytes / 2**30:.2f} that they may: allow more, or store them with `imagen-lightning shards "
                "embed` and set data.init_args.text_states"
            )
