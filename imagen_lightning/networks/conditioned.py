"""What the networks share: embedding the time, the text and the augmentation level, and text attended to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_lightning.networks.attention import TextAttention, TextReader, key_mask
from imagen_lightning.networks.layers import TimeEmbedding, activation
from imagen_lightning.networks.pooling import AttentionPooling, MeanPooling
from imagen_lightning.types import Conditioning, InputError, Text

POOLINGS = ("mean", "attention", "none")


@dataclass
class Precomputed(Conditioning):
    """A conditioning with all that its text gives a network at every step of a sampling run.

    Attributes:
        text_embedding: (B, time_dim) what the pooled text adds to the embedding of the time, or None.
    """

    text_embedding: Tensor | None = None


class ConditionedNetwork(nn.Module):
    """Base of the networks: `network(x_t, time, conditioning)` with x_t (B, C, H, W), time (B,) in [0, 1000].

    Args:
        channels: C of the images.
        time_channels: features of the sinusoidal embedding.
        time_dim: of the embedding that reaches every block.
        text_dim: D of the text states, None for a network without text.
        low_res: whether the upsampled low-resolution image is concatenated to x_t, and its augmentation level embedded.
        patch_size: side of the pixel patches folded into channels before the first convolution.
        act: "silu" or "gelu".
        embedding_activations: applied in turn to the embedding; None is `act`, once.
        text_projection: features that the states are projected to before attention reads them; None keeps D.
        text_pooling: "mean" (of the states), "attention" or "none": what is added to the embedding.
        pooling_heads: of the pooling by attention; divides D.
    """

    def __init__(
        self,
        channels: int,
        time_channels: int,
        time_dim: int,
        text_dim: int | None,
        low_res: bool,
        patch_size: int,
        *,
        act: str = "silu",
        embedding_activations: Sequence[str] | None = None,
        text_projection: int | None = None,
        text_pooling: str = "mean",
        pooling_heads: int = 64,
    ) -> None:
        super().__init__()
        at_least_one(channels=channels, dim=time_channels, time_dim=time_dim, patch_size=patch_size)
        at_least_one(text_dim=text_dim, text_projection=text_projection, pooling_heads=pooling_heads)
        if text_pooling not in POOLINGS:
            raise InputError(f"text_pooling {text_pooling!r} is unknown; use one of {', '.join(POOLINGS)}")
        self.channels = channels
        self.text_dim = text_dim
        self.low_res = low_res
        self.patch_size = patch_size
        self.time_embedding = TimeEmbedding(time_channels, time_dim, act)
        self.text_embedding: nn.Module | None = None
        self.project_text: nn.Module | None = None
        if text_dim is not None and text_pooling != "none":
            pooling = MeanPooling(text_dim, time_dim) if text_pooling == "mean" else None
            self.text_embedding = pooling or AttentionPooling(text_dim, time_dim, pooling_heads)
        if text_dim is not None and text_projection is not None:
            self.project_text = nn.Linear(text_dim, text_projection)
        self.aug_embedding = TimeEmbedding(time_channels, time_dim, act) if low_res else None
        names = [act] if embedding_activations is None else embedding_activations
        self.activate_embedding = nn.Sequential(*(activation(name) for name in names))
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
        pooled = self._pooled(conditioning)
        if pooled is not None:
            embedding = embedding + pooled.to(embedding.dtype)
        if self.aug_embedding is not None and conditioning.aug_level is not None:
            embedding = embedding + self.aug_embedding(1000.0 * conditioning.aug_level)
        return self.activate_embedding(embedding)

    def _pooled(self, conditioning: Conditioning) -> Tensor | None:
        """(B, time_dim) of the text, or None."""
        if isinstance(conditioning, Precomputed):
            return conditioning.text_embedding
        if self.text_embedding is None or conditioning.text is None:
            return None
        return self.text_embedding(conditioning.text)

    def join(self, x_t: Tensor, conditioning: Conditioning) -> Tensor:
        """x_t and the low-resolution image as one input, patches folded."""
        x = x_t if conditioning.low_res is None else torch.cat([x_t, conditioning.low_res.to(x_t.dtype)], dim=1)
        return F.pixel_unshuffle(x, self.patch_size) if self.patch_size > 1 else x

    def read(self, conditioning: Conditioning) -> Text | None:
        """The text as the attention layers read it: its states projected, where the network projects them."""
        text = conditioning.text
        if text is None or self.project_text is None or isinstance(conditioning, Precomputed):
            return text
        return replace(text, states=self.project_text(text.states))

    def precompute(self, conditioning: Conditioning) -> Conditioning:
        """The conditioning with every layer's text keys and values, which serve all steps of a sampling run."""
        text = self.read(conditioning)
        if text is None or isinstance(conditioning, Precomputed):
            return conditioning
        key_values = {
            name: layer.text_key_values(text.states, text.mask)
            for name, layer in self.named_modules()
            if isinstance(layer, TextReader) and layer.text_to_kv is not None
        }
        given = conditioning
        return Precomputed(given.text, given.low_res, given.aug_level, key_values, self._pooled(given))

    def attend(self, name: str, layer: nn.Module, x: Tensor, conditioning: Conditioning, text: Text | None) -> Tensor:
        """Runs the attention layer of that name, if it is one, with the conditioning's text as `read` gives it."""
        if not isinstance(layer, TextAttention):
            return x
        if text is None or layer.text_to_kv is None:
            return layer(x)
        pair = self.key_values(name, layer, conditioning, text)
        return layer(x, pair, key_mask(text.mask, x.shape[-1] * x.shape[-2], x.dtype))

    def key_values(
        self, name: str, layer: TextReader, conditioning: Conditioning, text: Text | None
    ) -> tuple[Tensor, Tensor] | None:
        """The text's keys and values for the layer of that name: those computed before, else computed now."""
        if text is None or layer.text_to_kv is None:
            return None
        ready = conditioning.key_values.get(name)
        return layer.text_key_values(text.states, text.mask) if ready is None else ready


def at_least_one(**numbers: int | None) -> None:
    """Check a network's sizes by name; None stands for none.

    Raises:
        InputError: one of them is below 1.
    """
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise InputError(f"{name} {number} must be at least 1")


def one_per_level(value: Any, levels: int, name: str, parts: str = "levels") -> list[Any]:
    """One value a level (or other part of the network), from one for all or a list.

    Raises:
        InputError: the list's length differs from the number of levels.
    """
    values = list(value) if isinstance(value, list | tuple) else [value] * levels
    if len(values) != levels:
        raise InputError(f"{name} {values} has {len(values)} entries for {levels} {parts}")
    return values


def per_level(value: int | list[int] | tuple[int, ...], levels: int, name: str) -> list[int]:
    """One number of at least 1 a level, from one number for all or a list.

    Raises:
        InputError: the list's length differs from the number of levels, or a number is below 1.
    """
    numbers = one_per_level(value, levels, name)
    if any(number < 1 for number in numbers):
        raise InputError(f"{name} {numbers} must be at least 1 at every level")
    return numbers
