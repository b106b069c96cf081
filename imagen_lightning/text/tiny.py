"""A text encoder without weights, vocabulary or download: hashed words, the offline default."""

from __future__ import annotations

import hashlib
import string
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from imagen_lightning.text.common import CutCounter, masked_mean, padded_length
from imagen_lightning.text.pseudo_tokens import PseudoTokens, add_vectors
from imagen_lightning.types import InputError, Text, TextEncoder

WORD_SHARE = 0.64
"""Share of a word vector's squared length that belongs to the whole word; the rest is its n-grams', which are shared
by words of similar spelling."""

LARGEST = 2**24

POSITION_SCALE = 0.2
"""Root mean square of the positions; that of the words is 1."""


class TinyTextEncoder(TextEncoder):
    """One fixed vector a word, made from the word's UTF-8 bytes, plus a small sinusoidal position.

    As in fastText (Bojanowski et al. 2017, section 3.2) a word is the sum of vectors of its n-grams (here of 1 to 3
    bytes, with boundary marks) and of the whole word; here they are pseudo-random signs drawn from a hash, the same on
    every platform, and nothing is learned. Words of any language work; similar spellings are a little similar,
    meanings are not. Words are split at whitespace and read without case and surrounding ASCII punctuation, so that
    "A red star." is "a red star". The positions (0.2 beside the words' 1, root mean square) let attention tell "a star
    above a circle" from "a circle above a star" without a `TransformerEncoder` in between.

    Args:
        dim: D, the length of a state.
        max_tokens: captions of more words are cut there, counted in `num_cut`, and a warning says so.
        seed: another seed gives other, unrelated vectors.

    Raises:
        InputError: dim or max_tokens below 1, or their product, the table of positions, above 2^24.
    """

    def __init__(self, dim: int = 128, max_tokens: int = 32, seed: int = 0) -> None:
        if dim < 1 or max_tokens < 1:
            raise InputError(f"TinyTextEncoder needs dim and max_tokens of at least 1, not {dim} and {max_tokens}")
        if dim * max_tokens > LARGEST:
            raise InputError(f"TinyTextEncoder's dim {dim} times max_tokens {max_tokens} must be at most {LARGEST}")
        self._dim = dim
        self.max_tokens = max_tokens
        self.seed = seed
        self._positions = _sinusoids(max_tokens, dim)
        self._cut = CutCounter()

    @property
    def name(self) -> str:
        """The settings that make the encoder: dim and seed."""
        return f"tiny-bytes-d{self._dim}-s{self.seed}"

    @property
    def dim(self) -> int:
        return self._dim

    @property
    def num_cut(self) -> int:
        """Captions cut so far."""
        return self._cut.num_cut

    def __call__(
        self, captions: Sequence[str], device: torch.device | str = "cpu", tokens: PseudoTokens | None = None
    ) -> Text:
        """Encodes B captions.

        Args:
            captions: B strings.
            device: of the states.
            tokens: words beside the encoder's own, whose vectors stand in the place of words; gradients reach them.

        Returns:
            states (B, L, D) with L the longest caption's number of words rounded up to a multiple of 4 (at most
            max_tokens), zero where padded; mask (B, L); pooled (B, D). An empty caption is one zero state.
        """
        lines = [_read(caption, tokens) for caption in captions]
        num_cut = sum(len(line) > self.max_tokens for line in lines)
        self._cut.add(num_cut, len(lines), limit=f"{self.max_tokens} words; a larger max_tokens reads more")
        lengths = [min(len(line), self.max_tokens) for line in lines]
        length = padded_length(max(lengths, default=1), 4, self.max_tokens)
        states = np.zeros((len(lines), length, self.dim), dtype=np.float32)
        mask = np.zeros((len(lines), length), dtype=bool)
        mask[:, 0] = True
        places = []
        for row, line in enumerate(lines):
            for column, word in enumerate(line[: self.max_tokens]):
                if isinstance(word, int):
                    places.append((row, column, word))
                else:
                    states[row, column] = _word_vector(word, self.dim, self.seed)
            states[row, : lengths[row]] += self._positions[: lengths[row]]
            mask[row, : lengths[row]] = True
        moved, on_device = torch.from_numpy(states).to(device), torch.from_numpy(mask).to(device)
        if places and tokens is not None:
            moved = add_vectors(moved, places, tokens)
        return Text(moved, on_device, masked_mean(moved, on_device))

    def num_tokens(self, captions: Sequence[str], tokens: PseudoTokens | None = None) -> list[int]:
        return [min(max(len(_read(caption, tokens)), 1), self.max_tokens) for caption in captions]

    def embed(self, text: str) -> Tensor:
        """The vectors (n, D) of a text's n words, without positions."""
        vectors = [_word_vector(word, self.dim, self.seed) for word in _words(text)]
        return torch.from_numpy(np.array(vectors, dtype=np.float32).reshape(-1, self.dim))


def _words(caption: str) -> list[str]:
    folded = unicodedata.normalize("NFC", caption).casefold()
    return [word.strip(string.punctuation) or word for word in folded.split()]


def _read(caption: str, tokens: PseudoTokens | None) -> list[str | int]:
    """The caption's words, and for each vector of a pseudo-word its number; marks attached to such are dropped."""
    parts = tokens.parts(caption) if tokens is not None else [caption]
    if tokens is None or len(parts) == 1:
        return list(_words(caption))
    places, read = tokens.places(), list[str | int]()
    for number, part in enumerate(parts):
        if number % 2:
            read += places[part]
            continue
        words = _words(part)
        if number > 0 and words and not part[0].isspace() and _is_mark(words[0]):
            del words[0]
        if number < len(parts) - 1 and words and not part[-1].isspace() and _is_mark(words[-1]):
            del words[-1]
        read += words
    return read


def _is_mark(word: str) -> bool:
    return not word.strip(string.punctuation)


@lru_cache(maxsize=65536)
def _word_vector(word: str, dim: int, seed: int) -> np.ndarray:
    data = b"<" + word.encode("utf-8", errors="replace") + b">"
    grams = [data[i : i + n] for n in (1, 2, 3) for i in range(len(data) - n + 1)]
    parts = np.sum([_signs(b"gram", gram, dim, seed) for gram in grams if gram not in (b"<", b">")], axis=0)
    vector = np.sqrt(WORD_SHARE) * _signs(b"word", data, dim, seed) + np.sqrt(1 - WORD_SHARE) * _unit_rms(parts)
    vector = _unit_rms(vector).astype(np.float32)
    vector.setflags(write=False)
    return vector


def _signs(kind: bytes, data: bytes, dim: int, seed: int) -> np.ndarray:
    # An extendable hash rather than a random generator, whose streams may change between releases of its library.
    digest = hashlib.shake_256(b"%s:%d:%s" % (kind, seed, data)).digest(-(-dim // 8))
    bits = np.unpackbits(np.frombuffer(digest, dtype=np.uint8))[:dim]
    return bits.astype(np.float64) * 2 - 1


def _unit_rms(vector: np.ndarray) -> np.ndarray:
    return vector / max(np.sqrt(np.mean(vector**2)), 1e-8)


def _sinusoids(length: int, dim: int) -> np.ndarray:
    """(length, dim): sines and cosines of wavelengths 2 pi to 200 pi, of root mean square POSITION_SCALE."""
    half = -(-dim // 2)
    angles = np.arange(length)[:, None] * 100.0 ** (-np.arange(half) / half)
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :dim]
    return (waves * np.sqrt(2) * POSITION_SCALE).astype(np.float32)
