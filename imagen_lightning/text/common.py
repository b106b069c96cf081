"""What the encoders share: the masked mean, padding, and the count of captions that were cut."""

from __future__ import annotations

import warnings

from torch import Tensor


def masked_mean(states: Tensor, mask: Tensor | None) -> Tensor:
    """Means states (B, L, D) over the tokens where mask (B, L) is True (all where it is None): (B, D).

    A caption without any token gives zeros.
    """
    if mask is None:
        return states.mean(dim=1)
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def padded_length(longest: int, multiple: int, max_tokens: int) -> int:
    """The longest caption rounded up to a multiple, at most max_tokens."""
    return min(-(-max(longest, 1) // multiple) * multiple, max_tokens)


class CutCounter:
    """Counts captions longer than the encoder reads; warns at the first and whenever the count has grown tenfold.

    Attributes:
        num_cut: captions cut so far.
        num_seen: captions counted so far, cut or whole.
    """

    def __init__(self) -> None:
        self.num_cut = 0
        self.num_seen = 0
        self._warn_at = 1

    def add(self, num_cut: int, num_seen: int, *, limit: str) -> None:
        """Adds a batch; `limit` says what captions were cut to and how to allow more."""
        self.num_cut += num_cut
        self.num_seen += num_seen
        if num_cut and self.num_cut >= self._warn_at:
            while self._warn_at <= self.num_cut:
                self._warn_at *= 10
            warnings.warn(f"{self.num_cut} of {self.num_seen} captions so far were cut to {limit}", stacklevel=3)
