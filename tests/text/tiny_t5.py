"""A T5 of random weights with the tests' own tokenizer."""

import torch
from given_data import copy_tokenizer


def save_tiny_t5(folder, **sizes):
    """Writes it to a folder; `sizes` are of its config."""
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(**sizes, vocab_size=32128, feed_forward_proj="gated-gelu")
    transformers.T5EncoderModel(config).save_pretrained(folder)
    copy_tokenizer(folder)
    return folder
