"""One vector from a caption's states, added to the embedding of the time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_lightning.networks.attention import split_heads
from imagen_lightning.types import InputError, Text


class MeanPooling(nn.Sequential):
    """The mean of the states, normalised and projected (Saharia et al. 2022, section 2.1).

    Args:
        text_dim: D of the text states.
        dim: of the vector.
    """

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__(nn.LayerNorm(text_dim), nn.Linear(text_dim, dim))

    def forward(self, text: Text) -> Tensor:
        """(B, dim)."""
        return super().forward(text.pooled.to(next(self.parameters()).dtype))


class AttentionPooling(nn.Module):
    """A query made from the mean of the states attends to it and to them (CLIP, Radford et al. 2021; DeepFloyd IF).

    Args:
        text_dim: D of the text states.
        dim: of the vector.
        num_heads: divides D.
    """

    def __init__(self, text_dim: int, dim: int, num_heads: int = 64) -> None:
        super().__init__()
        if text_dim % num_heads:
            raise InputError(f"pooling_heads {num_heads} do not divide the text's {text_dim} features")
        self.head_dim = text_dim // num_heads
        self.norm_in = nn.LayerNorm(text_dim)
        self.position = nn.Parameter(torch.randn(1, text_dim) / text_dim**0.5)
        self.to_q = nn.Linear(text_dim, text_dim)
        self.to_kv = nn.Linear(text_dim, 2 * text_dim)
        self.project = nn.Linear(text_dim, dim)
        self.norm_out = nn.LayerNorm(dim)

    def forward(self, text: Text) -> Tensor:
        """(B, dim), of the tokens that the text's mask counts."""
        states, mask = self.norm_in(text.states.to(self.norm_in.weight.dtype)), text.mask
        if mask is None:
            mean = states.mean(dim=1, keepdim=True)
        else:
            count = mask.sum(dim=1)[:, None, None].clamp(min=1)
            mean = states.masked_fill(~mask[:, :, None], 0.0).sum(dim=1, keepdim=True) / count
            mask = F.pad(mask, (1, 0), value=True)[:, None, None, :]
        first = mean + self.position
        key, value = self.to_kv(torch.cat([first, states], dim=1)).chunk(2, dim=-1)
        query, key, value = (split_heads(x, self.head_dim) for x in (self.to_q(first), key, value))
        pooled = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(1)
        return self.norm_out(self.project(pooled))
