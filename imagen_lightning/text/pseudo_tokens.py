"""New words for a frozen text encoder: vectors in the space of its input, learned from pictures.

Textual inversion (Gal et al. 2022, arXiv 2208.01618, section 3): nothing of the model is trained but the vectors that
the encoder reads where a caption has the new word; the loss is the diffusion model's own (their eq. 2).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_lightning.types import InputError, Text, TextEncoder

_WORD = re.compile(r"<[\w-]+>")


@runtime_checkable
class ReadsTokens(Protocol):
    """A `TextEncoder` that reads pseudo-words."""

    def embed(self, text: str) -> Tensor:
        """The input vectors (n, D) float32 of a text's n pieces, without marks of its end."""

    def __call__(
        self, captions: Sequence[str], device: torch.device | str = "cpu", tokens: PseudoTokens | None = None
    ) -> Text:
        """`TextEncoder.__call__`; where a caption has a word of `tokens` its vectors are read, with gradients."""


class PseudoTokens(nn.Module):
    """Words that a frozen text encoder does not know, each one or more vectors of its input.

    A word is written in angle brackets, "<zib>" or "<my-dog>", and found anywhere in a caption, in any case, attached
    to other characters or not, also where captions are cleaned. Words of that form that are not among these are read
    as any text is. The vectors are float32 whichever precision the encoder works in, lie in the stage's weights, and
    are NaN until `begin` sets them, which first use does.

    Args:
        words: number of vectors by word. A word of n vectors takes the place of n pieces of the caption.
        init: the text that a word begins from, one for all words or one by word: "purple star". Vector i of n begins
            as the mean of the i-th of n parts of the text's pieces. Not needed where weights are loaded.

    Raises:
        InputError: no words, one that cannot be told from text, two that differ in case alone, fewer than one vector,
            an init for a word that is not there.
    """

    def __init__(self, words: dict[str, int], init: dict[str, str] | str | None = None) -> None:
        super().__init__()
        if not words:
            raise InputError("PseudoTokens needs at least one word, e.g. {'<zib>': 1}")
        for word, count in words.items():
            if not _WORD.fullmatch(word):
                raise InputError(
                    f"pseudo-word {word!r} cannot be told from text; write letters, digits, - and _ in angle brackets, "
                    f"e.g. {_suggestion(word)!r}"
                )
            if count < 1:
                raise InputError(f"pseudo-word {word!r} has {count} vectors; give at least 1")
        self._spelling = {_folded(word): word for word in words}
        if len(self._spelling) < len(words):
            raise InputError(f"pseudo-words {', '.join(words)}: two of them differ in case alone, which is not read")
        foreign = sorted(set(init) - set(words)) if isinstance(init, Mapping) else []
        if foreign:
            raise InputError(f"init names {foreign[0]!r}, which is none of the pseudo-words {', '.join(words)}")
        self.words = dict(words)
        self.init = init
        self.vectors = nn.ParameterDict()

    # ---- vectors

    def attach(self, encoder: TextEncoder) -> None:
        """Gives the vectors the width of an encoder's input, where they have none yet.

        Raises:
            InputError: the encoder reads no pseudo-words, or vectors are of another width.
        """
        if not isinstance(encoder, ReadsTokens):
            raise InputError(
                f"text encoder {encoder.name!r} ({type(encoder).__name__}) reads no pseudo-words; use T5TextEncoder or "
                "TinyTextEncoder, or give yours `embed` and `tokens` as they have them"
            )
        for word, count in self.words.items():
            if word not in self.vectors:
                self.vectors[word] = nn.Parameter(torch.full((count, encoder.dim), torch.nan))
            elif self.vectors[word].shape[1] != encoder.dim:
                raise InputError(
                    f"pseudo-word {word!r} has vectors of {self.vectors[word].shape[1]} features; text encoder "
                    f"{encoder.name!r} reads {encoder.dim}"
                )

    @torch.no_grad()
    def begin(self, encoder: ReadsTokens) -> None:
        """Sets the vectors that nothing has set yet from their word of `init`.

        Raises:
            InputError: there is none, or it has no piece.
        """
        for word, vectors in self.vectors.items():
            if vectors.isnan().any():
                vectors.copy_(self._first(word, encoder))

    def _first(self, word: str, encoder: ReadsTokens) -> Tensor:
        text = self.init.get(word) if isinstance(self.init, Mapping) else self.init
        if text is None:
            raise InputError(
                f"pseudo-word {word!r} has no vectors yet; give PseudoTokens an init, e.g. {{'{word}': 'star'}}, or "
                "load them"
            )
        pieces, count = encoder.embed(text), self.words[word]
        if not len(pieces):
            raise InputError(f"init {text!r} of pseudo-word {word!r} is no text to the encoder; give a word")
        if len(pieces) < count:
            return pieces[torch.arange(count) % len(pieces)]
        return torch.stack([part.mean(dim=0) for part in pieces.tensor_split(count)])

    def joined(self, other: PseudoTokens) -> PseudoTokens:
        """Both's words, with the very parameters that each has.

        Raises:
            InputError: a word is in both.
        """
        for word in other.words:
            if self.known(word):
                raise InputError(
                    f"pseudo-word {word!r} is known to the stage already (it knows {', '.join(self.words)}); give the "
                    "new one another name"
                )
        made = PseudoTokens({**self.words, **other.words}, {**self._inits(), **other._inits()})
        for part in (self, other):
            made.vectors.update(part.vectors)
        return made

    def _inits(self) -> dict[str, str]:
        return dict.fromkeys(self.words, self.init) if isinstance(self.init, str) else dict(self.init or {})

    @property
    def table(self) -> Tensor:
        """All vectors (N, D), in the words' order."""
        return torch.cat([self.vectors[word] for word in self.words])

    def places(self) -> dict[str, range]:
        """Each word's rows in `table`."""
        found, begin = {}, 0
        for word, count in self.words.items():
            found[word] = range(begin, begin := begin + count)
        return found

    # ---- captions

    def parts(self, caption: str) -> list[str]:
        """The caption cut at its words: text, word, text, word, …, text; the words as they are spelt here."""
        text = unicodedata.normalize("NFC", caption)
        parts, begin = [], 0
        for match in _WORD.finditer(text):
            word = self._spelling.get(_folded(match[0]))
            if word is not None:
                parts += [text[begin : match.start()], word]
                begin = match.end()
        return [*parts, text[begin:]] if parts else [caption]

    def known(self, caption: str) -> list[str]:
        """The words in a caption, in their order."""
        return self.parts(caption)[1::2]

    def read(self, encoder: TextEncoder, captions: Sequence[str], device: torch.device | str = "cpu") -> Text:
        """Encodes B captions; gradients, where they are enabled, reach the vectors and nothing of the encoder."""
        assert isinstance(encoder, ReadsTokens)
        self.begin(encoder)
        text = encoder(captions, device, tokens=self)
        if torch.is_grad_enabled() and any(vectors.requires_grad for vectors in self.vectors.values()):
            # Also where no caption has the word: a loss without anything to train could not be differentiated.
            nothing = 0.0 * self.table.sum()
            return Text(text.states + nothing, text.mask, text.pooled + nothing)
        return text

    def refuse_stored(self, captions: Sequence[str]) -> None:
        """Raises InputError where stored states stand for a caption that has one of the words."""
        for caption in captions:
            words = self.known(caption)
            if words:
                raise InputError(
                    f"caption {caption!r} has the pseudo-word {words[0]!r}, which its stored text states do not know; "
                    "leave the states out (data.init_args.text_states: null, and no text.npz in the shards)"
                )


def add_vectors(x: Tensor, places: Sequence[tuple[int, int, int]], tokens: PseudoTokens) -> Tensor:
    """States x (B, L, D) with vectors added: (b, l, n) adds row n of the tokens' table to x[b, l]. x stays as it is."""
    rows, columns, numbers = torch.tensor(places, device=x.device).unbind(dim=1)
    vectors = F.embedding(numbers, tokens.table.to(x.device))
    return x.index_put((rows, columns), vectors.to(x.dtype), accumulate=True)


def _folded(word: str) -> str:
    return unicodedata.normalize("NFC", word.casefold())


def _suggestion(word: str) -> str:
    letters = re.sub(r"[^-\w]+", "-", word).strip("-")
    return f"<{letters or 'zib'}>"
