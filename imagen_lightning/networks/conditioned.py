"""What the networks share: embedding the time, the text and the augmentation level, and text attended to."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_lightning.networks.attention import TextAttention, key_mask
from imagen_lightning.networks.layers import TimeEmbedding
from imagen_lightning.types import Conditioning, InputError


class ConditionedNetwork(nn.Module):
    """Base of the U-Nets: `network(x_t, time, conditioning)` with x_t (B, C, H, W), time (B,) in [0, 1000].

    Args:
        channels: C of the images.
        time_channels: features of the sinusoidal embedding.
        time_dim: of the embedding that reaches every block.
        text_dim: D of the text states, None for a network without text.
        low_res: whether the upsampled low-resolution image is concatenated to x_t, and its augmentation level embedded.
        patch_size: side of the pixel patches folded into channels before the first convolution.
    """

    def __init__(
        self, channels: int, time_channels: int, time_dim: int, text_dim: int | None, low_res: bool, patch_size: int
    ) -> None:
        super().__init__()
        self.channels = channels
        self.text_dim = text_dim
        self.low_res = low_res
        self.patch_size = patch_size
        self.time_embedding = TimeEmbedding(time_channels, time_dim)
        self.text_embedding = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, time_dim)) if text_dim else None
        self.aug_embedding = TimeEmbedding(time_channels, time_dim) if low_res else None
        self.in_channels = (2 if low_res else 1) * channels * patch_size**2

    def check(self, x_t: Tensor, conditioning: Conditioning, stride: int) -> None:
        """Raises InputError where the inputs are not those the network was made for."""
        text, low_res = conditioning.text, conditioning.low_res
        if self.text_dim is not None and text is None:
            raise InputError(f"the network has text_dim {self.text_dim} but was given no text")
        if self.text_dim is not None and text is not None and text.states.shape[-1] != self.text_dim:
            raise InputError(
                f"the network has text_dim {self.text_dim} but its text has {text.states.shape[-1]} features"
            )
        if self.low_res != (low_res is not None):
            has, given = ("needs a", "none") if self.low_res else ("takes no", "one")
            raise InputError(f"the network {has} low-resolution image and was given {given} as low_res")
        if low_res is not None and low_res.shape != x_t.shape:
            raise InputError(f"low_res of shape {tuple(low_res.shape)} must be enlarged to x_t's {tuple(x_t.shape)}")
        if low_res is not None and conditioning.aug_level is None:
            raise InputError("the network embeds the noise level of low_res and was given no aug_level; 0 is none")
        if x_t.shape[-1] % stride or x_t.shape[-2] % stride:
            raise InputError(f"the network needs sides divisible by {stride}, got {tuple(x_t.shape[-2:])}")

    def embed(self, time: Tensor, conditioning: Conditioning) -> Tensor:
        """(B, time_dim), activated."""
        embedding = self.time_embedding(time)
        if self.text_embedding is not None and conditioning.text is not None:
            embedding = embedding + self.text_embedding(conditioning.text.pooled.to(embedding.dtype))
        if self.aug_embedding is not None and conditioning.aug_level is not None:
            embedding = embedding + self.aug_embedding(1000.0 * conditioning.aug_level)
        return F.silu(embedding)

    def join(self, x_t: Tensor, conditioning: Conditioning) -> Tensor:
        """x_t and the low-resolution image as one input, patches folded."""
        x = x_t if conditioning.low_res is None else torch.cat([x_t, conditioning.low_res.to(x_t.dtype)], dim=1)
        return F.pixel_unshuffle(x, self.patch_size) if self.patch_size > 1 else x

    def precompute(self, conditioning: Conditioning) -> Conditioning:
        """The conditioning with every layer's text keys and values, which serve all steps of a sampling run."""
        if conditioning.text is None:
            return conditioning
        states = conditioning.text.states
        key_values = {
            name: layer.text_key_values(states)
            for name, layer in self.named_modules()
            if isinstance(layer, TextAttention) and layer.text_to_kv is not None
        }
        return replace(conditioning, key_values=key_values)

    def attend(self, name: str, layer: TextAttention, x: Tensor, conditioning: Conditioning) -> Tensor:
        """Runs an attention layer with the conditioning's text."""
        text = conditioning.text
        if text is None or layer.text_to_kv is None:
            return layer(x)
        key_values = conditioning.key_values.get(name)
        if key_values is None:
            key_values = layer.text_key_values(text.states)
        return layer(x, key_values, key_mask(text.mask, x.shape[-1] * x.shape[-2], x.dtype))


def per_level(value: int | list[int] | tuple[int, ...], levels: int, name: str) -> list[int]:
    """One number of at least 1 a level, from one number for all or a list.

    Raises:
        InputError: the list's length differs from the number of levels, or a number is below 1.
    """
    numbers = [value] * levels if isinstance(value, int) else list(value)
    if len(numbers) != levels:
        raise InputError(f"{name} {numbers} has {len(numbers)} entries for {levels} levels")
    if any(number < 1 for number in numbers):
        raise InputError(f"{name} {numbers} must be at least 1 at every level")
    return numbers
