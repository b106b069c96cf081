"""Attention over the pixels of a feature map, the text, or both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_lightning.types import InputError


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, N, heads * head_dim) to (B, heads, N, head_dim)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def scaled_dot_product(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(Q K^T / sqrt(d) + mask) V of (B, heads, N, d), by torch's kernel or, where they are faster, two products.

    They are on a CPU in bf16 with few keys, 2 to 3 times at 300 (`benchmarks/train_step.py`'s second level).
    """
    if query.dtype != torch.bfloat16 or query.device.type != "cpu" or key.shape[2] > 512:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return (logits if mask is None else logits + mask).softmax(dim=-1) @ value


class TextLayerNorm(nn.LayerNorm):
    """Each token by its own statistics."""

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """States (B, L, D), normalised."""
        return super().forward(states)


class TextGroupNorm(nn.GroupNorm):
    """Each of 32 groups of features by its statistics over all tokens of a caption, as in DeepFloyd IF."""

    def __init__(self, dim: int) -> None:
        if dim % 32:
            raise InputError(f"text_norm 'group' has 32 groups, which do not divide the text's {dim} features")
        super().__init__(32, dim)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """States (B, L, D), normalised; tokens where mask (B, L) is False do not count."""
        if mask is None:
            return super().forward(states.transpose(1, 2)).transpose(1, 2)
        grouped = states.unflatten(-1, (self.num_groups, -1))
        counts = mask[:, :, None, None].to(states.dtype)
        total = counts.sum(dim=1, keepdim=True).clamp(min=1) * grouped.shape[-1]
        centred = grouped - (grouped * counts).sum(dim=(1, 3), keepdim=True) / total
        variance = (centred.square() * counts).sum(dim=(1, 3), keepdim=True) / total
        normed = (centred * torch.rsqrt(variance + self.eps)).flatten(2)
        return torch.addcmul(self.bias, normed, self.weight)


class TextAsItIs(nn.Module):
    """No normalisation."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        return states


TEXT_NORMS: dict[str, type[nn.Module]] = {"layer": TextLayerNorm, "group": TextGroupNorm, "none": TextAsItIs}


class TextReader(nn.Module):
    """What every layer that attends to text has: the text's keys and values, which do not depend on the time.

    Args:
        channels: features of keys and of values, over all heads.
        text_dim: D of the text states, or None for no text.
        head_dim: features a head; divides channels.
        text_norm: of the states: "layer" (each token), "group" (32 groups over all tokens) or "none".
    """

    def __init__(self, channels: int, text_dim: int | None, head_dim: int, text_norm: str = "layer") -> None:
        super().__init__()
        if channels % head_dim:
            raise InputError(f"head_dim {head_dim} does not divide the {channels} channels of an attention layer")
        if text_norm not in TEXT_NORMS:
            raise InputError(f"text_norm {text_norm!r} is unknown; use one of {', '.join(TEXT_NORMS)}")
        self.head_dim = head_dim
        self.text_norm = TEXT_NORMS[text_norm](text_dim) if text_dim is not None else None
        self.text_to_kv = nn.Linear(text_dim, 2 * channels) if text_dim is not None else None

    def text_key_values(self, states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, L, head_dim) of text states (B, L, D) that count where mask (B, L) is True."""
        assert self.text_to_kv is not None
        assert self.text_norm is not None
        key, value = self.text_to_kv(self.text_norm(states, mask)).chunk(2, dim=-1)
        return split_heads(key, self.head_dim), split_heads(value, self.head_dim)


class TextAttention(TextReader):
    """Residual attention of a feature map to itself and to the text.

    With `to_self` the text's keys and values are concatenated to the map's own (Saharia et al. 2022, section 2.1);
    without it the map attends to the text alone (cross-attention).

    Args:
        channels: of the feature map.
        text_dim: D of the text states, or None for no text.
        head_dim: features a head; divides channels.
        groups: of the normalisation.
        to_self: whether the map attends to itself.
        text_norm: of the text states: "layer", "group" or "none".
    """

    def __init__(
        self,
        channels: int,
        text_dim: int | None,
        head_dim: int = 64,
        groups: int = 32,
        to_self: bool = True,
        text_norm: str = "layer",
    ) -> None:
        super().__init__(channels, text_dim, head_dim, text_norm)
        if text_dim is None and not to_self:
            raise InputError("cross-attention needs text; give the network a text_dim")
        self.to_self = to_self
        self.norm = nn.GroupNorm(groups, channels)
        self.to_qkv = nn.Linear(channels, 3 * channels if to_self else channels)
        self.to_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, x: Tensor, text: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None) -> Tensor:
        """x (B, C, H, W); text keys and values; mask (B, 1, 1, keys) added to the logits, over text then pixels."""
        channels, height, width = x.shape[1:]
        # One product for queries, keys and values: it reads (and, for the gradient, keeps) the transposed map once.
        query, *own = self.to_qkv(self.norm(x).flatten(2).transpose(1, 2)).split(channels, dim=-1)
        query = split_heads(query, self.head_dim)
        pairs = [(text[0].to(query.dtype), text[1].to(query.dtype))] if text is not None else []
        if self.to_self:
            pairs.append((split_heads(own[0], self.head_dim), split_heads(own[1], self.head_dim)))
        key, value = pairs[0] if len(pairs) == 1 else (torch.cat(parts, dim=2) for parts in zip(*pairs))
        if mask is not None:
            mask = mask[..., : key.shape[2]].to(query.dtype)
        out = scaled_dot_product(query, key, value, mask)
        out = self.to_out(out.transpose(1, 2).flatten(2))
        return x + out.transpose(1, 2).unflatten(2, (height, width))


def key_mask(text_mask: Tensor | None, num_pixels: int, dtype: torch.dtype) -> Tensor | None:
    """(B, 1, 1, L + num_pixels) addend for the logits: 0 where a key counts, -inf at the text's padding."""
    if text_mask is None:
        return None
    addend = torch.zeros(text_mask.shape, dtype=dtype, device=text_mask.device)
    addend = addend.masked_fill(~text_mask, float("-inf"))
    return F.pad(addend, (0, num_pixels))[:, None, None, :]
