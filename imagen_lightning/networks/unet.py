"""Imagen's base U-Net (Saharia et al. 2022, appendix F.1; blocks of Dhariwal & Nichol 2021), DeepFloyd IF's too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_lightning.networks.attention import TextAttention
from imagen_lightning.networks.conditioned import ConditionedNetwork, at_least_one, one_per_level, per_level
from imagen_lightning.networks.layers import ResidualBlock, recomputed
from imagen_lightning.networks.layers import activation as activation_layer
from imagen_lightning.types import Conditioning, InputError


class UNet(ConditionedNetwork):
    """U-Net with text in its attention and its time embedding.

    Text states are concatenated to the self-attention's keys and values, pooled text is added to the time embedding,
    which scales and shifts every residual block. Levels are joined by residual blocks that halve or double the map.

    With other settings it is the U-Net of DeepFloyd IF's stages; `imagen_lightning.export.diffusers_unet` reads them
    from a checkpoint's config.json.

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
        head_dim: features an attention head, one number or one a level.
        groups: of the group normalisations.
        dropout: in the residual blocks.
        channels: of the images.
        out_channels: of the output: those of the images, or twice as many where the variance is learned (Nichol &
            Dhariwal 2021, eq. 15).
        time_dim: features of the embedding of the time; None for 4 dim.
        activation: "silu" or "gelu" (IF).
        embedding_activations: applied in turn to the embedding of the time; None is `activation`, once.
        eps: of the normalisations in the residual blocks and before the output.
        text_projection: features that the text states are projected to before attention reads them (IF); None keeps
            text_dim.
        text_norm: of the states in each attention layer: "layer" (each token), "group" (32 groups over all tokens of a
            caption, IF) or "none".
        text_pooling: what is added to the embedding of the time: the "mean" of the states, their pooling by "attention"
            (IF) or "none".
        pooling_heads: heads of the pooling by attention; IF: 64.
        skip_scale: factor of the skips before they are concatenated.
        mid_scale: what the sums of the middle's residual blocks are divided by; IF-II: sqrt(2).
        out_scale: the same for those of all levels.
        recompute: whether a level's activations are computed again in the backward pass instead of kept, one value or
            one a level: less memory for a third more time. The middle goes with the last level.
    """

    def __init__(
        self,
        dim: int = 128,
        multipliers: Sequence[float] = (1, 2, 3, 4),
        num_blocks: int | list[int] = 3,
        attention: Sequence[bool] = (False, True, True, True),
        text_dim: int | None = None,
        low_res: bool = False,
        patch_size: int = 1,
        head_dim: int | list[int] = 64,
        groups: int = 32,
        dropout: float = 0.0,
        channels: int = 3,
        out_channels: int = 3,
        time_dim: int | None = None,
        activation: str = "silu",
        embedding_activations: list[str] | None = None,
        eps: float = 1e-5,
        text_projection: int | None = None,
        text_norm: str = "layer",
        text_pooling: str = "mean",
        pooling_heads: int = 64,
        skip_scale: float = 1.0,
        mid_scale: float = 1.0,
        out_scale: float = 1.0,
        recompute: bool | list[bool] = False,
    ) -> None:
        at_least_one(groups=groups, out_channels=out_channels)
        features = 4 * dim if time_dim is None else time_dim
        super().__init__(
            channels,
            dim,
            features,
            text_dim,
            low_res,
            patch_size,
            act=activation,
            embedding_activations=embedding_activations,
            text_projection=text_projection,
            text_pooling=text_pooling,
            pooling_heads=pooling_heads,
        )
        self.dim, self.multipliers, self.num_blocks, self.attention = dim, multipliers, num_blocks, attention
        self.head_dim, self.groups, self.dropout, self.out_channels = head_dim, groups, dropout, out_channels
        self.time_dim, self.activation, self.embedding_activations = time_dim, activation, embedding_activations
        self.eps, self.text_projection, self.text_norm = eps, text_projection, text_norm
        self.text_pooling, self.pooling_heads = text_pooling, pooling_heads
        self.skip_scale, self.mid_scale, self.out_scale = skip_scale, mid_scale, out_scale
        levels = len(multipliers)
        blocks, heads = per_level(num_blocks, levels, "num_blocks"), per_level(head_dim, levels, "head_dim")
        attends = one_per_level(list(attention), levels, "attention")
        self.recompute_with(recompute)
        widths = [round(dim * multiplier) for multiplier in multipliers]
        if any(width % groups for width in widths):
            raise InputError(f"groups {groups} does not divide every level's channels {widths}")
        self.stride = patch_size * 2 ** (levels - 1)
        states_dim = text_dim if text_dim is None or text_projection is None else text_projection

        def block(inputs: int, outputs: int, resample: str = "none", scale: float = out_scale) -> ResidualBlock:
            return ResidualBlock(inputs, outputs, features, resample, groups, dropout, activation, eps, scale)

        def attend(level: int) -> nn.Module:
            if not attends[level]:
                return nn.Identity()
            return TextAttention(widths[level], states_dim, heads[level], groups, text_norm=text_norm)

        self.conv_in = nn.Conv2d(self.in_channels, widths[0], 3, padding=1)
        self.down_blocks, self.down_attention = nn.ModuleList(), nn.ModuleList()
        self.level_down: list[int] = []
        width, skips = widths[0], [widths[0]]
        for level, out in enumerate(widths):
            for _ in range(blocks[level]):
                self.down_blocks.append(block(width, out))
                self.down_attention.append(attend(level))
                width = out
                skips.append(width)
            if level < levels - 1:
                self.down_blocks.append(block(width, width, "down"))
                self.down_attention.append(nn.Identity())
                skips.append(width)
            self.level_down += [level] * (len(self.down_blocks) - len(self.level_down))
        self.mid_in, self.mid_attention = block(width, width, scale=mid_scale), attend(levels - 1)
        self.mid_out = block(width, width, scale=mid_scale)
        self.up_blocks, self.up_attention = nn.ModuleList(), nn.ModuleList()
        self.num_skips: list[int] = []
        self.level_up: list[int] = []
        for level in reversed(range(levels)):
            out = widths[level]
            for _ in range(blocks[level] + 1):
                self.up_blocks.append(block(width + skips.pop(), out))
                self.up_attention.append(attend(level))
                self.num_skips.append(1)
                width = out
            if level > 0:
                self.up_blocks.append(block(width, width, "up"))
                self.up_attention.append(nn.Identity())
                self.num_skips.append(0)
            self.level_up += [level] * (len(self.up_blocks) - len(self.level_up))
        self.norm_out = nn.GroupNorm(groups, width, eps)
        self.activate_out = activation_layer(activation)
        self.conv_out = nn.Conv2d(width, out_channels * patch_size**2, 3, padding=1)
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

        def run(block: nn.Module, attention: nn.Module, name: str, level: int, h: Tensor, *skips: Tensor) -> Tensor:
            def compute(h: Tensor, *skips: Tensor) -> Tensor:
                h = block(torch.cat([h, *skips], dim=1) if skips else h, embedding)
                return self.attend(name, attention, h, conditioning, text)

            return recomputed(compute, h, *skips) if self.recompute_levels[level] else compute(h, *skips)

        def middle(h: Tensor) -> Tensor:
            h = self.attend("mid_attention", self.mid_attention, self.mid_in(h, embedding), conditioning, text)
            return self.mid_out(h, embedding)

        h = self.conv_in(self.join(x_t, conditioning))
        skips = [h]
        for i, parts in enumerate(zip(self.down_blocks, self.down_attention)):
            h = run(*parts, f"down_attention.{i}", self.level_down[i], h)
            skips.append(h)
        h = recomputed(middle, h) if self.recompute_levels[-1] else middle(h)
        for i, parts in enumerate(zip(self.up_blocks, self.up_attention)):
            taken = [skips.pop() for _ in range(self.num_skips[i])]
            if self.skip_scale != 1:
                taken = [skip * self.skip_scale for skip in taken]
            h = run(*parts, f"up_attention.{i}", self.level_up[i], h, *taken)
        h = self.conv_out(self.activate_out(self.norm_out(h)))
        return F.pixel_shuffle(h, self.patch_size) if self.patch_size > 1 else h
