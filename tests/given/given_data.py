"""Data that tests are given by IMAGEN_LIGHTNING_TEST_DATA, and the T5 tokenizer that they make themselves."""

import functools
import io
import itertools
import os
import shutil
import tempfile
from pathlib import Path

import pytest

VARIABLE = "IMAGEN_LIGHTNING_TEST_DATA"
# Numbers of T5's special tokens, as in every published T5.
SPECIAL = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}


def given(*parts: str) -> Path:
    """Return a file or folder of the given data; skip the test where there is none."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"set {VARIABLE} to the folder that holds {'/'.join(parts)}")
    path = Path(folder, *parts)
    if not path.exists():
        pytest.skip(f"{VARIABLE}={folder} has no {'/'.join(parts)}")
    return path


@functools.cache
def t5_tokenizer() -> Path:
    """Return a folder with the files of a T5 tokenizer, trained here on captions and the licence."""
    from sentencepiece import SentencePieceTrainer

    folder, model = Path(tempfile.mkdtemp(prefix="t5-tokenizer-")), io.BytesIO()
    shapes, colours = ("star", "circle", "cross", "ring"), ("red", "blue", "green", "white")
    captions = [f"a small {a} {b} above a large {c} {d}" for a, b, c, d in itertools.product(colours, shapes, repeat=2)]
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8").splitlines()
    SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in text if line.strip()] + captions),
        model_writer=model,
        vocab_size=1000,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **SPECIAL,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 100}')
    return folder


def copy_tokenizer(folder: Path) -> None:
    """Add the tokenizer's files to a model's folder."""
    for file in t5_tokenizer().iterdir():
        shutil.copy(file, folder)
