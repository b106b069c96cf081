"""Attention over the pixels of a feature map, the text, or both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_lightning.types import InputError


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, N, heads * head_dim) to (B, heads, N, head_dim)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


class TextAttention(nn.Module):
    """Residual attention of a feature map to itself and to the text.

    With `to_self` the text's keys and values are concatenated to the map's own (Saharia et al. 2022, section 2.1);
    without it the map attends to the text alone (cross-attention).

    Args:
        channels: of the feature map.
        text_dim: D of the text states, or None for no text.
        head_dim: features a head; divides channels.
        groups: of the normalisation.
        to_self: whether the map attends to itself.
    """

    def __init__(
        self, channels: int, text_dim: int | None, head_dim: int = 64, groups: int = 32, to_self: bool = True
    ) -> None:
        super().__init__()
        if channels % head_dim:
            raise InputError(f"head_dim {head_dim} does not divide the {channels} channels of an attention layer")
        if text_dim is None and not to_self:
            raise InputError("cross-attention needs text; give the network a text_dim")
        self.head_dim = head_dim
        self.norm = nn.GroupNorm(groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_kv = nn.Linear(channels, 2 * channels) if to_self else None
        self.text_norm = nn.LayerNorm(text_dim) if text_dim is not None else None
        self.text_to_kv = nn.Linear(text_dim, 2 * channels) if text_dim is not None else None
        self.to_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def text_key_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, L, head_dim) of text states (B, L, D); they do not depend on the time."""
        assert self.text_to_kv is not None
        assert self.text_norm is not None
        key, value = self.text_to_kv(self.text_norm(states)).chunk(2, dim=-1)
        return split_heads(key, self.head_dim), split_heads(value, self.head_dim)

    def forward(self, x: Tensor, text: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None) -> Tensor:
        """x (B, C, H, W); text keys and values; mask (B, 1, 1, keys) added to the logits, over text then pixels."""
        _, _, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        query = split_heads(self.to_q(tokens), self.head_dim)
        keys, values = [], []
        if text is not None:
            keys.append(text[0].to(query.dtype))
            values.append(text[1].to(query.dtype))
        if self.to_kv is not None:
            key, value = self.to_kv(tokens).chunk(2, dim=-1)
            keys.append(split_heads(key, self.head_dim))
            values.append(split_heads(value, self.head_dim))
        key = torch.cat(keys, dim=2) if len(keys) > 1 else keys[0]
        value = torch.cat(values, dim=2) if len(values) > 1 else values[0]
        if mask is not None:
            mask = mask[..., : key.shape[2]].to(query.dtype)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out = self.to_out(out.transpose(1, 2).flatten(2))
        return x + out.transpose(1, 2).unflatten(2, (height, width))


def key_mask(text_mask: Tensor | None, num_pixels: int, dtype: torch.dtype) -> Tensor | None:
    """(B, 1, 1, L + num_pixels) addend for the logits: 0 where a key counts, -inf at the text's padding."""
    if text_mask is None:
        return None
    addend = torch.zeros(text_mask.shape, dtype=dtype, device=text_mask.device)
    addend = addend.masked_fill(~text_mask, float("-inf"))
    return F.pad(addend, (0, num_pixels))[:, None, None, :]
