"""A T5 of random weights with the published tokenizer."""

import shutil
from pathlib import Path

import pytest
import torch

TOKENIZER = Path(__file__).parents[3] / "shared" / "data" / "tokenizers" / "t5-v1_1"

needs_tokenizer = pytest.mark.skipif(
    not TOKENIZER.is_dir(), reason="the published T5 v1.1 tokenizer files do not lie beside the repository"
)


def save_tiny_t5(folder, **sizes):
    """Writes it to a folder; `sizes` are of its config."""
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(**sizes, vocab_size=32128, feed_forward_proj="gated-gelu")
    transformers.T5EncoderModel(config).save_pretrained(folder)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, folder)
    return folder
