"""A plain transformer on patches of pixels (JiT; Li & He 2025, arXiv 2511.13720)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_lightning.networks.attention import TextReader, key_mask, split_heads
from imagen_lightning.networks.conditioned import ConditionedNetwork, one_per_level
from imagen_lightning.networks.layers import recomputed, sinusoidal
from imagen_lightning.types import Conditioning, InputError


class PatchTransformer(ConditionedNetwork):
    """Attention and feed-forward blocks on large patches of pixels, without convolutions or levels; made to predict x0.

    A patch may hold more numbers than a block has features: noise does not fit through, images do, since they lie on a
    manifold of few dimensions (Li & He 2025, sections 1 and 4). So `X0` is its parametrization. The embedding of time,
    pooled text and augmentation level shifts, scales and gates every block (adaLN-Zero, Peebles & Xie 2023); text
    states are concatenated to the keys and values of self-attention, as in Imagen's U-Net.

    Args:
        dim: features of a patch, a multiple of head_dim. JiT-B: 768.
        num_layers: blocks. JiT-B: 12.
        patch_size: side of a patch; JiT has 16 by 16 patches at any size of image.
        bottleneck: features through which patches enter; JiT-B: 128.
        text_dim: D of the text states; None for a network without text.
        low_res: whether it takes a low-resolution image.
        head_dim: features an attention head, a multiple of 4.
        dropout: after each attention and feed-forward.
        channels: of the images.
        out_channels: of the output: those of the images, or twice as many where the variance is learned.
        recompute: whether a block's activations are computed again in the backward pass instead of kept, one value or
            one a block: less memory for a third more time.
    """

    def __init__(
        self,
        dim: int = 768,
        num_layers: int = 12,
        patch_size: int = 4,
        bottleneck: int = 128,
        text_dim: int | None = None,
        low_res: bool = False,
        head_dim: int = 64,
        dropout: float = 0.0,
        channels: int = 3,
        out_channels: int = 3,
        recompute: bool | list[bool] = False,
    ) -> None:
        super().__init__(channels, 256, dim, text_dim, low_res, patch_size)
        if head_dim % 4 or dim % head_dim:
            raise InputError(f"head_dim {head_dim} must be a multiple of 4 and divide dim {dim}")
        self.dim, self.num_layers, self.bottleneck, self.head_dim = dim, num_layers, bottleneck, head_dim
        self.dropout, self.out_channels = dropout, out_channels
        self.stride = patch_size
        self.patch_in = nn.Sequential(nn.Linear(self.in_channels, bottleneck, bias=False), nn.Linear(bottleneck, dim))
        self.blocks = nn.ModuleList(Block(dim, text_dim, head_dim, dropout) for _ in range(num_layers))
        self.recompute_with(recompute)
        self.norm_out, self.modulate_out = RMSNorm(dim), _zero(nn.Linear(dim, 2 * dim))
        self.patch_out = _zero(nn.Linear(dim, out_channels * patch_size**2))

    def recompute_with(self, value: bool | list[bool]) -> None:
        """Sets `recompute`."""
        self.recompute_levels = one_per_level(value, self.num_layers, "recompute", "blocks")
        self.recompute = value

    def forward(self, x_t: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """x_t (B, C, H, W), time (B,) in [0, 1000] to the output (B, out_channels, H, W)."""
        self.check(x_t, conditioning, self.stride)
        embedding, text = self.embed(time, conditioning)[:, None], self.read(conditioning)
        patches = self.join(x_t, conditioning)
        height, width = patches.shape[-2:]
        rotation = rotary(height, width, self.head_dim, x_t.device)
        mask = key_mask(text.mask, height * width, x_t.dtype) if text is not None else None

        def run(index: int, block: Block, tokens: Tensor) -> Tensor:
            pair = self.key_values(f"blocks.{index}.attention", block.attention, conditioning, text)
            return block(tokens, embedding, rotation, pair, mask)

        tokens = self.patch_in(patches.flatten(2).transpose(1, 2))
        tokens = tokens + positions(height, width, self.dim, x_t.device).to(tokens.dtype)
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            if self.recompute_levels[index]:
                tokens = recomputed(lambda t, i=index, b=block: run(i, b, t), tokens)
            else:
                tokens = run(index, block, tokens)
        shift, scale = self.modulate_out(embedding).chunk(2, dim=-1)
        out = self.patch_out(torch.addcmul(shift, self.norm_out(tokens), 1 + scale))
        return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, (height, width)), self.patch_size)


class RMSNorm(nn.RMSNorm):
    """Zhang & Sennrich 2019, in its input's dtype: under autocast torch's own meets two dtypes and loses its kernel."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Block(nn.Module):
    """Attention, then SwiGLU (Shazeer 2020), each shifted, scaled and gated by the embedding; at first the identity."""

    def __init__(self, dim: int, text_dim: int | None, head_dim: int, dropout: float) -> None:
        super().__init__()
        hidden = 8 * dim // 3  # as many weights as two layers of 4 dim
        self.modulate = _zero(nn.Linear(dim, 6 * dim))
        self.attention_norm, self.feed_norm = RMSNorm(dim), RMSNorm(dim)
        self.attention = PatchAttention(dim, text_dim, head_dim)
        self.feed_in, self.feed_out = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        embedding: Tensor,
        rotation: Tensor,
        text: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
    ) -> Tensor:
        """x (B, N, dim), embedding (B, 1, dim), rotation (N, head_dim / 2); text and mask as in attention."""
        parts = self.modulate(embedding).chunk(6, dim=-1)
        shift, scale, gate, feed_shift, feed_scale, feed_gate = parts
        h = torch.addcmul(shift, self.attention_norm(x), 1 + scale)
        x = x + gate * self.dropout(self.attention(h, rotation, text, mask))
        h, g = self.feed_in(torch.addcmul(feed_shift, self.feed_norm(x), 1 + feed_scale)).chunk(2, dim=-1)
        return x + feed_gate * self.dropout(self.feed_out(F.silu(g) * h))


class PatchAttention(TextReader):
    """Attention of patches to each other and to the text, of normalised queries and keys (Henry et al. 2020)."""

    def __init__(self, dim: int, text_dim: int | None, head_dim: int) -> None:
        super().__init__(dim, text_dim, head_dim)
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.query_norm, self.key_norm = RMSNorm(head_dim), RMSNorm(head_dim)

    def text_key_values(self, states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys, normalised, and values (B, heads, L, head_dim); text has no place among the patches: no rotation."""
        key, value = super().text_key_values(states, mask)
        return self.key_norm(key), value

    def forward(self, x: Tensor, rotation: Tensor, text: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        """x (B, N, dim); text keys and values; mask (B, 1, 1, keys) added to the logits, over text then patches."""
        query, key, value = (split_heads(part, self.head_dim) for part in self.to_qkv(x).chunk(3, dim=-1))
        query = rotate(self.query_norm(query), rotation).to(value.dtype)
        key = rotate(self.key_norm(key), rotation).to(value.dtype)
        if text is not None:
            key = torch.cat([text[0].to(key.dtype), key], dim=2)
            value = torch.cat([text[1].to(value.dtype), value], dim=2)
        mask = mask.to(query.dtype) if mask is not None else None
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.to_out(out.transpose(1, 2).flatten(2))


def positions(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """(height * width, dim) sinusoids of the row and of the column (Vaswani et al. 2017)."""
    rows, columns = (sinusoidal(torch.arange(n, device=device), dim // 2) for n in (height, width))
    return torch.cat([rows.repeat_interleave(width, dim=0), columns.repeat(height, 1)], dim=-1)


def rotary(height: int, width: int, head_dim: int, device: torch.device) -> Tensor:
    """(height * width, head_dim / 2) angles: half of the pairs turn with the row, half with the column.

    Rotary embedding (Su et al. 2021, eq. 34) along two axes.
    """
    quarter = head_dim // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    rows, columns = (torch.arange(n, device=device)[:, None] * frequencies for n in (height, width))
    return torch.cat([rows.repeat_interleave(width, dim=0), columns.repeat(height, 1)], dim=-1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x (..., N, head_dim), its pairs (i, i + head_dim / 2) turned by angles (N, head_dim / 2)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
