"""What tells one text encoder's states from another's: digests of the tokenizer at work and of the weights' files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

PROBES = (
    "",
    "a small red star above a large blue circle on a white background",
    "An oil painting of two Corgis, wearing party hats & sunglasses; 35mm, f/1.8, #nofilter!",
    " ".join(chr(code) for code in range(33, 127)),
    "crème brûlée, naïve façade, Größe, smörgåsbord, cafe\u0301, İstanbul, œuvre, ½ cup … “quotes” — €5 £3 ¥9",
    "красная звезда над синим кругом; κόκκινο αστέρι; כוכב אדום; نجمة حمراء; लाल तारा; ดาวแดง",
    "赤い星 紅色的星星 빨간 별 ｆｕｌｌ ﬁne",
    "emoji \U0001f534\u2b50\ufe0f \U0001f468\u200d\U0001f469\u200d\U0001f467 zero\u200bwidth a\tb\nc",
    "&lt;b&gt;sale&lt;/b&gt; &amp;amp; https://example.com/a?b=c www.example.org me@example.com @someone IMG_0001.jpg",
    "the quick brown fox jumps over the lazy dog 0123456789 antidisestablishmentarianism xylophonist",
)
"""Captions in which tokenizers, and the ways to clean captions, differ."""

_SAMPLES, _BYTES = 4096, 4096  # of a weights' file: 16 MiB, however large it is


def digest_tokens(rows: Iterable[Sequence[int]]) -> str:
    """16 hexadecimal digits of token numbers: equal for tokenizers that read PROBES alike, whatever their files."""
    return hashlib.sha256(json.dumps([list(row) for row in rows]).encode()).hexdigest()[:16]


def digest_weights(folder: Path) -> str:
    """16 hexadecimal digits of the names, sizes and evenly spaced samples of a folder's weights; "" where it has none.

    Of each file at most 4096 times 4096 bytes are read: a second for 20 GB, and some of each of its large tensors.
    safetensors come before PyTorch's files, as they do when a model is loaded.

    Raises:
        OSError: a file cannot be read.
    """
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        return ""
    digest = hashlib.sha256()
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            digest.update(f"{path.name}:{size}:".encode())
            last = max(size - _BYTES, 0)
            places = range(0, size, _BYTES) if size <= _SAMPLES * _BYTES else _spread(last)
            for place in places:
                digest.update(os.pread(descriptor, _BYTES, place))
        finally:
            os.close(descriptor)
    return digest.hexdigest()[:16]


def _spread(last: int) -> list[int]:
    """_SAMPLES places from 0 to `last`."""
    return [last * number // (_SAMPLES - 1) for number in range(_SAMPLES)]


def difference(
    stored: Mapping[str, str], wanted: Mapping[str, str], ignore: Iterable[str] = ()
) -> tuple[str, str, str] | None:
    """(name, stored, wanted) of the first value of `wanted` that is stored otherwise, or None.

    A weights' digest that either side lacks says nothing; any other value that is not stored is another one.
    """
    for name, value in wanted.items():
        there = stored.get(name, "")
        unknown = name == "weights" and not (there and value)
        if there != value and name not in ignore and not unknown:
            return name, there, value
    return None
