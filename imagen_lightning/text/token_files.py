"""Files of pseudo-words: `NAME.tokens.safetensors`, one tensor of vectors a word, and of which encoder they are.

The tensors are named as the words and have the shape (n, D), float32; a file of one word is at once a textual-inversion
file as diffusers reads it. The metadata holds strings alone, and nothing of a file is ever run:

| key | content |
| --- | --- |
| `format`, `version` | "imagen-lightning pseudo-tokens", "1" |
| `words` | JSON list of the words, in their order |
| `dim` | D |
| `identity` | JSON of the encoder's `identity()`: name, token length, digests of tokenizer and weights, … |
| `licence` | of the vectors, or "" |
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from imagen_lightning.files import parse_json
from imagen_lightning.io.atomic import write_bytes
from imagen_lightning.text.identity import difference
from imagen_lightning.text.pseudo_tokens import PseudoTokens
from imagen_lightning.types import InputError, TextEncoder

FORMAT = "imagen-lightning pseudo-tokens"
VERSION = "1"
SUFFIX = ".tokens.safetensors"


@dataclass(frozen=True)
class TokenFile:
    """What a file holds.

    Attributes:
        path: the file.
        vectors: (n, D) float32 by word.
        identity: of the encoder that they were trained through (`TextEncoder.identity`).
        licence: of the vectors, or "".
    """

    path: Path
    vectors: dict[str, Tensor]
    identity: dict[str, str]
    licence: str

    def tokens(self, encoder: TextEncoder) -> PseudoTokens:
        """The words with their vectors.

        Raises:
            InputError: the encoder is another than theirs; with both values.
        """
        apart = difference(self.identity, encoder.identity(), ignore=("precision",))
        if apart is not None:
            name, there, here = apart
            encoders = f" (encoders {self.identity.get('encoder')!r} and {encoder.name!r})" if name != "encoder" else ""
            raise InputError(
                f"pseudo-words {str(self.path)!r} were trained through another text encoder: {name} is "
                f"{there or 'unknown'!r} there and {here!r} here{encoders}; give words of this one"
            )
        made = PseudoTokens({word: len(vectors) for word, vectors in self.vectors.items()})
        for word, vectors in self.vectors.items():
            made.vectors[word] = torch.nn.Parameter(vectors.clone())
        made.attach(encoder)  # compares the widths
        return made


def save_tokens(
    path: str | Path, tokens: PseudoTokens, encoder: TextEncoder, words: Sequence[str] = (), licence: str = ""
) -> None:
    """Writes words with their vectors, whole or not at all.

    Args:
        path: a new file NAME.tokens.safetensors.
        tokens: the words.
        encoder: through which they were trained.
        words: which of them; by default all.
        licence: of the vectors.

    Raises:
        InputError: another suffix, a file that is there or cannot be written, a word that is unknown or has no vectors.
    """
    path = Path(path).expanduser()
    if not path.name.endswith(SUFFIX) or path.name == SUFFIX:
        raise InputError(f"file of pseudo-words {str(path)!r} must be named NAME{SUFFIX}")
    if path.exists():
        raise InputError(f"{str(path)!r} is there already; give another name")
    tensors = {}
    for word in words or tokens.words:
        spelt = tokens.known(word)
        if not spelt:
            raise InputError(f"the stage knows no pseudo-word {word!r}; it knows {', '.join(tokens.words)}")
        vectors = tokens.vectors[spelt[0]].detach().float().cpu().clone()
        if not vectors.isfinite().all():
            raise InputError(f"vectors of pseudo-word {word!r} are not trained: they are NaN or infinite")
        tensors[spelt[0]] = vectors
    metadata = {
        **{"format": FORMAT, "version": VERSION, "dim": str(encoder.dim), "licence": licence},
        "words": json.dumps(list(tensors), ensure_ascii=False),
        "identity": json.dumps(encoder.identity(), ensure_ascii=False),
    }
    try:
        write_bytes(path, save(tensors, metadata=metadata))
    except OSError as error:
        raise InputError(f"file of pseudo-words {str(path)!r} cannot be written: {error.strerror}") from error


def read_tokens(path: str | Path) -> TokenFile:
    """Reads a file of pseudo-words.

    Raises:
        InputError: it is missing, damaged, no such file, or of another format version.
    """
    path = Path(path).expanduser()
    what = f"file of pseudo-words {str(path)!r}"
    if not path.is_file():
        raise InputError(f"{what} does not exist; `imagen-lightning tokens` writes them")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{what} is damaged or no safetensors file ({error}); copy it again") from error
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{what} was not written by `imagen-lightning tokens`: it does not say of which text encoder it is"
        )
    if metadata.get("version") != VERSION:
        raise InputError(
            f"{what} is of format {metadata.get('version')!r}; this version reads {VERSION!r}: use a newer "
            "imagen-lightning"
        )
    identity, words, dim = _json(metadata, "identity"), _json(metadata, "words"), metadata.get("dim")
    plain = isinstance(identity, dict) and all(isinstance(value, str) for value in identity.values())
    named = isinstance(words, list) and sorted(map(str, words)) == sorted(tensors) != []
    fit = all(t.dim() == 2 and len(t) and t.is_floating_point() and str(t.shape[1]) == dim for t in tensors.values())
    if not (plain and named and fit and all(bool(t.isfinite().all()) for t in tensors.values())):
        raise InputError(f"{what} is damaged: its vectors and what it says of them do not agree; copy it again")
    vectors = {word: tensors[word].float() for word in words}
    return TokenFile(path, vectors, identity, metadata.get("licence", ""))


def add_tokens(stages: Sequence[Any], path: str | Path) -> list[str]:
    """Gives words from a file to every stage of a cascade that has their encoder.

    A stage that knows a word with these very vectors, as the one that it was trained in does, keeps it.

    Args:
        stages: of a cascade, with `text` and `attach_tokens` (`DiffusionMixin`).
        path: the file.

    Returns:
        The words.

    Raises:
        InputError: no stage has that encoder, or one knows a word by other vectors; with both sides.
    """
    file = read_tokens(path)
    readers = [stage for stage in stages if stage.text.encoder is not None]
    if not readers:
        raise InputError(f"pseudo-words {str(path)!r}: no stage reads text; drop them")
    refused: InputError | None = None
    given = False
    for stage in readers:
        try:
            tokens = file.tokens(stage.text.encoder)
        except InputError as error:
            refused = error
            continue
        given = True
        new = _unknown_words(tokens, stage.text.tokens, file)
        if new is not None:
            stage.attach_tokens(new)
    if not given and refused is not None:
        raise refused
    return list(file.vectors)


def _unknown_words(tokens: PseudoTokens, known: PseudoTokens | None, file: TokenFile) -> PseudoTokens | None:
    """Those of the words that a stage does not know with the same vectors; None where there is none."""
    if known is None:
        return tokens
    new = {}
    for word, count in tokens.words.items():
        spelt = known.known(word)
        if not spelt:
            new[word] = count
        elif not torch.equal(known.vectors[spelt[0]].cpu(), tokens.vectors[word].cpu()):
            raise InputError(
                f"pseudo-word {word!r} of {str(file.path)!r} is known to a stage already, by other vectors; train it "
                "under another name"
            )
    if not new:
        return None
    made = PseudoTokens(new)
    for word in new:
        made.vectors[word] = tokens.vectors[word]
    return made


def _json(metadata: Mapping[str, str], name: str) -> Any:
    """A value of the metadata, None where it is no JSON."""
    try:
        return parse_json(metadata.get(name, ""))
    except ValueError:
        return None
