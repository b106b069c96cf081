"""Imagen's base U-Net (Saharia et al. 2022, appendix F.1; blocks of Dhariwal & Nichol 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_lightning.networks.attention import TextAttention
from imagen_lightning.networks.conditioned import ConditionedNetwork, per_level
from imagen_lightning.networks.layers import ResidualBlock
from imagen_lightning.types import Conditioning, InputError


class UNet(ConditionedNetwork):
    """U-Net with text in its attention and its time embedding.

    Text states are concatenated to the self-attention's keys and values, pooled text is added to the time embedding,
    which scales and shifts every residual block. Levels are joined by residual blocks that halve or double the map.

    Args:
        dim: channels of the first level. Imagen's base: 512.
        multipliers: channels of each level, in units of dim.
        num_blocks: residual blocks a level, one number or one a level.
        attention: for each level, whether its blocks are followed by attention; level i works at
            size / patch_size / 2^i.
        text_dim: D of the text states; None for a network without text.
        low_res: whether it takes a low-resolution image (super-resolution).
        patch_size: side of pixel patches folded into channels at the input and unfolded at the output (Hoogeboom et al.
            2023, section 2.3); a cheap way to work at half the size.
        head_dim: features an attention head.
        groups: of the group normalisations.
        dropout: in the residual blocks.
        channels: of the images.
    """

    def __init__(
        self,
        dim: int = 128,
        multipliers: Sequence[int] = (1, 2, 3, 4),
        num_blocks: int | list[int] = 3,
        attention: Sequence[bool] = (False, True, True, True),
        text_dim: int | None = None,
        low_res: bool = False,
        patch_size: int = 1,
        head_dim: int = 64,
        groups: int = 32,
        dropout: float = 0.0,
        channels: int = 3,
    ) -> None:
        time_dim = 4 * dim
        super().__init__(channels, dim, time_dim, text_dim, low_res, patch_size)
        self.dim, self.multipliers, self.num_blocks, self.attention = dim, multipliers, num_blocks, attention
        self.head_dim, self.groups, self.dropout = head_dim, groups, dropout
        levels = len(multipliers)
        blocks = per_level(num_blocks, levels, "num_blocks")
        if len(attention) != levels:
            raise InputError(f"attention {list(attention)} has {len(attention)} entries for {levels} levels")
        widths = [dim * multiplier for multiplier in multipliers]
        if any(width % groups for width in widths):
            raise InputError(f"groups {groups} does not divide every level's channels {widths}")
        self.stride = patch_size * 2 ** (levels - 1)

        def block(inputs: int, outputs: int, resample: str = "none") -> ResidualBlock:
            return ResidualBlock(inputs, outputs, time_dim, resample, groups, dropout)

        def attend(width: int, wanted: bool) -> nn.Module:
            return TextAttention(width, text_dim, head_dim, groups) if wanted else nn.Identity()

        self.conv_in = nn.Conv2d(self.in_channels, widths[0], 3, padding=1)
        self.down_blocks, self.down_attention = nn.ModuleList(), nn.ModuleList()
        width, skips = widths[0], [widths[0]]
        for level, out in enumerate(widths):
            for _ in range(blocks[level]):
                self.down_blocks.append(block(width, out))
                self.down_attention.append(attend(out, attention[level]))
                width = out
                skips.append(width)
            if level < levels - 1:
                self.down_blocks.append(block(width, width, "down"))
                self.down_attention.append(nn.Identity())
                skips.append(width)
        self.mid_in, self.mid_attention = block(width, width), attend(width, attention[-1])
        self.mid_out = block(width, width)
        self.up_blocks, self.up_attention, self.num_skips = nn.ModuleList(), nn.ModuleList(), []
        for level in reversed(range(levels)):
            out = widths[level]
            for _ in range(blocks[level] + 1):
                self.up_blocks.append(block(width + skips.pop(), out))
                self.up_attention.append(attend(out, attention[level]))
                self.num_skips.append(1)
                width = out
            if level > 0:
                self.up_blocks.append(block(width, width, "up"))
                self.up_attention.append(nn.Identity())
                self.num_skips.append(0)
        self.norm_out = nn.GroupNorm(groups, width)
        self.conv_out = nn.Conv2d(width, channels * patch_size**2, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    def forward(self, x_t: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """x_t (B, C, H, W), time (B,) in [0, 1000] to the output (B, C, H, W)."""
        self.check(x_t, conditioning, self.stride)
        embedding = self.embed(time, conditioning)

        def run(part: str, index: int, block: nn.Module, attention: nn.Module, h: Tensor) -> Tensor:
            h = block(h, embedding)
            if isinstance(attention, TextAttention):
                h = self.attend(f"{part}_attention.{index}", attention, h, conditioning)
            return h

        h = self.conv_in(self.join(x_t, conditioning))
        skips = [h]
        for i, (block, attention) in enumerate(zip(self.down_blocks, self.down_attention)):
            h = run("down", i, block, attention, h)
            skips.append(h)
        h = self.mid_in(h, embedding)
        if isinstance(self.mid_attention, TextAttention):
            h = self.attend("mid_attention", self.mid_attention, h, conditioning)
        h = self.mid_out(h, embedding)
        for i, (block, attention) in enumerate(zip(self.up_blocks, self.up_attention)):
            if self.num_skips[i]:
                h = torch.cat([h, skips.pop()], dim=1)
            h = run("up", i, block, attention, h)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, self.patch_size) if self.patch_size > 1 else h
