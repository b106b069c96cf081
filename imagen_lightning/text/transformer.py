"""A trainable transformer over the states of a frozen text encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_lightning.text.common import masked_mean
from imagen_lightning.types import InputError, Text


class TransformerEncoder(nn.Module):
    """Reads a caption's states in context: Text with D = input_dim to Text with D = dim.

    Pre-norm blocks (Xiong et al. 2020) of multi-head self-attention and a GELU feed-forward of four times the width,
    over layer-normalised and projected input states plus learned positions, closed by a LayerNorm. Part of the stage
    that trains it and of that stage's weights.

    Args:
        input_dim: D of the frozen encoder's states.
        dim: D of the states that come out.
        num_layers: blocks.
        num_heads: attention heads, a divisor of dim.
        max_tokens: largest number L of tokens, at least the frozen encoder's max_tokens.
        dropout: probability of dropping a residual branch's element in training, in [0, 1).

    Raises:
        InputError: dim is not a multiple of num_heads, or dropout is out of range.
    """

    def __init__(
        self,
        input_dim: int,
        dim: int = 192,
        num_layers: int = 2,
        num_heads: int = 4,
        max_tokens: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise InputError(f"TransformerEncoder dim {dim} is not a multiple of num_heads {num_heads}; change one")
        if not 0 <= dropout < 1:
            raise InputError(f"TransformerEncoder dropout {dropout} is not in [0, 1)")
        self.input_dim = input_dim
        self.dim = dim
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.max_tokens = max_tokens
        self.dropout = dropout
        # Encoders differ in scale: states of T5 v1.1 are some ten times smaller than those of TinyTextEncoder.
        self.input_norm = nn.LayerNorm(input_dim)
        self.input_projection = nn.Linear(input_dim, dim)
        self.positions = nn.Parameter(torch.randn(max_tokens, dim) * 0.1)
        self.blocks = nn.ModuleList(_Block(dim, num_heads, dropout) for _ in range(num_layers))
        self.output_norm = nn.LayerNorm(dim)

    def forward(self, text: Text) -> Text:
        """Encodes states (B, L, input_dim); padded tokens are neither attended to nor returned (their states are 0).

        Returns:
            states (B, L, dim), the mask as it came, pooled (B, dim) the masked mean of the states.

        Raises:
            InputError: L is above max_tokens, or the states' D is not input_dim.
        """
        length, features = text.states.shape[1:]
        if features != self.input_dim:
            raise InputError(
                f"text states have {features} features but TransformerEncoder input_dim is {self.input_dim}"
            )
        if length > self.max_tokens:
            raise InputError(
                f"text of {length} tokens is longer than TransformerEncoder max_tokens {self.max_tokens}; raise it, or "
                f"lower the text encoder's max_tokens"
            )
        keys = None
        if text.mask is not None:
            # Softmax over no key at all is NaN, so a caption without tokens attends to its padding.
            keys = (text.mask | ~text.mask.any(dim=1, keepdim=True))[:, None, None, :]
        x = self.input_projection(self.input_norm(text.states.to(self.positions.dtype))) + self.positions[:length]
        for block in self.blocks:
            x = block(x, keys)
        states = self.output_norm(x)
        if text.mask is not None:
            states = states * text.mask.unsqueeze(-1)
        return Text(states, text.mask, masked_mean(states, text.mask))


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attention_out = nn.Linear(dim, dim)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """x (B, L, D); keys (B, 1, 1, L) bool, True where a token may be attended to."""
        batch, length, dim = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        x = x + self.dropout(self.attention_out(attended.transpose(1, 2).reshape(batch, length, dim)))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
