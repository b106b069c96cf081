"""The published T5 encoders' shapes, known without their files (Raffel et al. 2020; T5 v1.1 and Flan-T5 after it)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NUM_BUCKETS = 32  # of the relative positions


@dataclass(frozen=True)
class T5Shape:
    """An encoder's size.

    Attributes:
        d_model: features of a state.
        d_ff: of the feed-forward layers.
        num_layers: blocks of the encoder.
        num_heads: of attention.
        d_kv: features a head.
        vocab_size: rows of the embedding.
        gated: whether the feed-forward has a gate, hence three matrices.
    """

    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    d_kv: int = 64
    vocab_size: int = 32128
    gated: bool = True

    @classmethod
    def of(cls, config: Any) -> T5Shape:
        """That of a transformers config."""
        names = ("d_model", "d_ff", "num_layers", "num_heads", "d_kv", "vocab_size")
        return cls(**{name: int(getattr(config, name)) for name in names}, gated=bool(config.is_gated_act))

    @property
    def _matrices(self) -> int:
        """Parameters of one block's products."""
        inner = self.num_heads * self.d_kv
        return 4 * self.d_model * inner + (3 if self.gated else 2) * self.d_model * self.d_ff

    @property
    def num_parameters(self) -> int:
        """Embedding, blocks with two norms, the last norm, and the first block's positions."""
        blocks = self.num_layers * (self._matrices + 2 * self.d_model)
        return self.vocab_size * self.d_model + blocks + self.d_model + NUM_BUCKETS * self.num_heads

    def flops(self, num_tokens: int) -> int:
        """Of the products, for one caption."""
        attention = 4 * num_tokens**2 * self.num_heads * self.d_kv
        return self.num_layers * (2 * num_tokens * self._matrices + attention)

    def kept_numbers(self, num_tokens: int) -> int:
        """About how many numbers a caption's forward pass keeps for a backward pass through the frozen encoder."""
        inner = self.num_heads * self.d_kv
        token = 4 * self.d_model + 4 * inner + (4 if self.gated else 2) * self.d_ff
        return self.num_layers * (num_tokens * token + 2 * self.num_heads * num_tokens**2)


_V1_1 = {
    "small": T5Shape(512, 1024, 8, 6),
    "base": T5Shape(768, 2048, 12, 12),
    "large": T5Shape(1024, 2816, 24, 16),
    "xl": T5Shape(2048, 5120, 24, 32),
    "xxl": T5Shape(4096, 10240, 24, 64),
}
_FIRST = {
    "small": T5Shape(512, 2048, 6, 8, gated=False),
    "base": T5Shape(768, 3072, 12, 12, gated=False),
    "large": T5Shape(1024, 4096, 24, 16, gated=False),
    "3b": T5Shape(1024, 16384, 24, 32, 128, gated=False),
    "11b": T5Shape(1024, 65536, 24, 128, 128, gated=False),
}
_SHAPES = {
    **{f"google/t5-v1_1-{size}": shape for size, shape in _V1_1.items()},
    **{f"google/flan-t5-{size}": shape for size, shape in _V1_1.items()},
    **{f"{owner}t5-{size}": shape for size, shape in _FIRST.items() for owner in ("", "google-t5/")},
}


def published_shape(name: str) -> T5Shape | None:
    """The shape of the encoder that Hugging Face's hub has under a name; None where it is not known here."""
    if name.startswith("DeepFloyd/"):  # its pipelines' text_encoder
        return _V1_1["xxl"]
    return _SHAPES.get(name)
