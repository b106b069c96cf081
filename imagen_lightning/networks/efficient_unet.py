"""Imagen's Efficient U-Net for super-resolution (Saharia et al. 2022, appendix B and figures A.28-A.30)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_lightning.networks.attention import TextAttention
from imagen_lightning.networks.conditioned import ConditionedNetwork, at_least_one, one_per_level, per_level
from imagen_lightning.networks.layers import NearestUp, PixelShuffleUp, ResidualBlock, TransposedUp, recomputed
from imagen_lightning.types import Conditioning, InputError

ATTENTION_FORMS = ("none", "self", "cross")
UPSAMPLINGS: dict[str, type[nn.Module]] = {
    "nearest": NearestUp,
    "pixel_shuffle": PixelShuffleUp,
    "transposed": TransposedUp,
}


class EfficientUNet(ConditionedNetwork):
    """U-Net that keeps its parameters at low resolution.

    Every level halves the map before its blocks (the first too) and doubles it after them; skips are scaled by
    1/sqrt(2).

    Args:
        dim: unit of the channels. Imagen's 64 -> 256: 128.
        multipliers: channels of each level, in units of dim; level i works at size / patch_size / 2^(i+1).
        num_blocks: residual blocks a level, one number or one a level. Imagen: 2, 4, 8, 8.
        attention: for each level "none", "self" (self-attention with the text concatenated; 64 -> 256 at its lowest
            level) or "cross" (to the text alone; 256 -> 1024).
        text_dim: D of the text states; None for a network without text.
        low_res: whether it takes a low-resolution image.
        patch_size: side of pixel patches folded into channels at the input and unfolded at the output.
        head_dim: features an attention head.
        groups: of the group normalisations.
        dropout: in the residual blocks.
        channels: of the images.
        out_channels: of the output: those of the images, or twice as many where the variance is learned.
        upsampling: how a level doubles its map: "nearest" (and a convolution), "pixel_shuffle" or "transposed".
        recompute: whether a level's activations are computed again in the backward pass instead of kept, one value or
            one a level: less memory for a third more time.
    """

    def __init__(
        self,
        dim: int = 128,
        multipliers: Sequence[int] = (1, 2, 4, 8),
        num_blocks: int | list[int] = 2,
        attention: Sequence[str] = ("none", "none", "none", "self"),
        text_dim: int | None = None,
        low_res: bool = True,
        patch_size: int = 1,
        head_dim: int = 64,
        groups: int = 32,
        dropout: float = 0.0,
        channels: int = 3,
        out_channels: int = 3,
        upsampling: str = "nearest",
        recompute: bool | list[bool] = False,
    ) -> None:
        at_least_one(groups=groups, out_channels=out_channels, head_dim=head_dim)
        time_dim = 4 * dim
        super().__init__(channels, dim, time_dim, text_dim, low_res, patch_size)
        self.dim, self.multipliers, self.num_blocks, self.attention = dim, multipliers, num_blocks, attention
        self.head_dim, self.groups, self.dropout, self.out_channels = head_dim, groups, dropout, out_channels
        self.upsampling = upsampling
        levels = len(multipliers)
        blocks = per_level(num_blocks, levels, "num_blocks")
        if len(attention) != levels or any(form not in ATTENTION_FORMS for form in attention):
            raise InputError(
                f"attention {list(attention)} must name one of {ATTENTION_FORMS} for each of {levels} levels"
            )
        if upsampling not in UPSAMPLINGS:
            raise InputError(f"upsampling {upsampling!r} is unknown; use one of {', '.join(UPSAMPLINGS)}")
        self.recompute_with(recompute)
        widths = [dim * multiplier for multiplier in multipliers]
        if any(width % groups for width in [dim, *widths]):
            raise InputError(f"groups {groups} does not divide every level's channels {widths}")
        self.stride = patch_size * 2**levels

        def attend(width: int, form: str) -> nn.Module:
            return nn.Identity() if form == "none" else TextAttention(width, text_dim, head_dim, groups, form == "self")

        self.conv_in = nn.Conv2d(self.in_channels, dim, 3, padding=1)
        self.down, self.down_blocks, self.down_attention = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.up, self.up_blocks, self.up_attention = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            above = widths[level - 1] if level else dim
            self.down.append(nn.Conv2d(above, width, 3, stride=2, padding=1))
            self.down_blocks.append(
                nn.ModuleList(
                    ResidualBlock(width, width, time_dim, "none", groups, dropout) for _ in range(blocks[level])
                )
            )
            self.down_attention.append(attend(width, attention[level]))
            inputs = [width if i else 2 * width for i in range(blocks[level])]
            self.up_blocks.append(
                nn.ModuleList(ResidualBlock(size, width, time_dim, "none", groups, dropout) for size in inputs)
            )
            self.up_attention.append(attend(width, attention[level]))
            self.up.append(UPSAMPLINGS[upsampling](width, above))
        self.norm_out = nn.GroupNorm(groups, dim)
        self.conv_out = nn.Conv2d(dim, out_channels * patch_size**2, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    def recompute_with(self, value: bool | list[bool]) -> None:
        """Sets `recompute`."""
        self.recompute_levels = one_per_level(value, len(self.multipliers), "recompute")
        self.recompute = value

    def forward(self, x_t: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """x_t (B, C, H, W), time (B,) in [0, 1000] to the output (B, out_channels, H, W)."""
        self.check(x_t, conditioning, self.stride)
        embedding, text = self.embed(time, conditioning), self.read(conditioning)

        def descend(level: int, h: Tensor) -> Tensor:
            h = self.down[level](h)
            for block in self.down_blocks[level]:  # type: ignore[attr-defined]
                h = block(h, embedding)
            return self.attend(f"down_attention.{level}", self.down_attention[level], h, conditioning, text)

        def ascend(level: int, h: Tensor, skip: Tensor) -> Tensor:
            h = torch.cat([h, skip / math.sqrt(2)], dim=1)
            for block in self.up_blocks[level]:  # type: ignore[attr-defined]
                h = block(h, embedding)
            h = self.attend(f"up_attention.{level}", self.up_attention[level], h, conditioning, text)
            return self.up[level](h)

        def run(part: Callable[..., Tensor], level: int, *maps: Tensor) -> Tensor:
            part = partial(part, level)
            return recomputed(part, *maps) if self.recompute_levels[level] else part(*maps)

        h = stem = self.conv_in(self.join(x_t, conditioning))
        skips = []
        for level in range(len(self.down)):
            h = run(descend, level, h)
            skips.append(h)
        for level in reversed(range(len(self.up))):
            h = run(ascend, level, h, skips.pop())
        h = self.conv_out(F.silu(self.norm_out(h + stem)))
        return F.pixel_shuffle(h, self.patch_size) if self.patch_size > 1 else h
