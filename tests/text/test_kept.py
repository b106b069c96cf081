"""Kept text states against their encoders, and that the encoder's weights are gone."""

import copy
import gc
import logging
import weakref

import pytest
import torch
from tiny_t5 import save_tiny_t5

from imagen_lightning.text import T5TextEncoder, TinyTextEncoder
from imagen_lightning.text.kept import KeptStates
from imagen_lightning.types import InputError

CAPTIONS = ["a small red star above a large blue circle on a white background", "a cat", "", "two dogs"]


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return save_tiny_t5(
        tmp_path_factory.mktemp("models") / "tiny-t5", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
    )


def same(first, second):
    masks = (first.mask is None and second.mask is None) or torch.equal(first.mask, second.mask)
    return masks and torch.equal(first.states, second.states) and torch.equal(first.pooled, second.pooled)


BATCHES = [CAPTIONS, CAPTIONS[1:], [""], ["a cat", "a cat"], CAPTIONS[::-1]]


@pytest.mark.parametrize("captions", BATCHES)
def test_states_that_do_not_depend_on_neighbours_are_the_encoders_to_the_bit(captions):
    encoder = TinyTextEncoder(20, max_tokens=8)
    kept = KeptStates(encoder)
    assert kept.keep(CAPTIONS) == 4
    assert same(kept(captions), encoder(captions))


@pytest.mark.parametrize("padding", ["masked", "attended"])
def test_t5s_states_are_its_own_to_rounding(t5, padding):
    encoder = T5TextEncoder(str(t5), max_tokens=24, padding=padding)
    kept = KeptStates(encoder)
    kept.keep(CAPTIONS)
    for captions in BATCHES:
        live, stored = encoder(captions), kept(captions)
        assert (live.mask is None) == (stored.mask is None) == (padding == "attended")
        assert live.mask is None or torch.equal(live.mask, stored.mask)
        assert torch.allclose(stored.states, live.states, rtol=1e-4, atol=1e-5)
        assert torch.allclose(stored.pooled, live.pooled, rtol=1e-4, atol=1e-5)
    assert all(same(kept([caption]), encoder([caption])) for caption in CAPTIONS)  # alone, as it was encoded


def test_the_weights_are_gone_and_come_again_when_asked_for(t5):
    encoder = T5TextEncoder(str(t5), max_tokens=24)
    encoder(["a cat"])
    model = weakref.ref(encoder._model)
    weight = weakref.ref(next(encoder._model.parameters()))
    kept = KeptStates(encoder)
    kept.keep(CAPTIONS)
    gc.collect()
    assert model() is None
    assert weight() is None
    before = kept(CAPTIONS)
    assert "_model" not in vars(encoder)  # nothing was loaded for it
    assert same(kept(CAPTIONS), before)
    alone = encoder(["a cat"])
    assert "_model" in vars(encoder)
    assert same(kept(["a cat"]), alone)


def test_an_error_of_the_encoder_frees_it_too(t5, monkeypatch):
    encoder = T5TextEncoder(str(t5), max_tokens=24)
    encoder(["a cat"])
    monkeypatch.setattr(encoder, "_tokenize", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        KeptStates(encoder).keep(["a dog"])
    assert "_model" not in vars(encoder)


def test_a_caption_that_nobody_named_is_encoded_once_and_told(caplog):
    calls = []

    class Counting(TinyTextEncoder):
        def __call__(self, captions, device="cpu"):
            calls.append(list(captions))
            return super().__call__(captions, device)

        def free(self):
            calls.append("freed")

    kept = KeptStates(Counting(8))
    kept.keep(["a", "b", "a"])
    assert calls == [["a"], ["b"], "freed"]
    assert kept.keep(["b"]) == 0
    with caplog.at_level(logging.WARNING):
        kept(["a", "c"])
        kept(["c", "b"])
    assert calls == [["a"], ["b"], "freed", ["c"], "freed"]
    assert [record.message for record in caplog.records] == [
        "the text encoder is loaded again for a caption that was not kept: 'c'"
    ]
    assert len(kept) == 3


def test_states_that_take_too_much_memory_are_refused_before_any_is_made():
    encoder = TinyTextEncoder(256)
    captions = ["one two three", "four"]  # four words of 1024 bytes
    KeptStates(encoder, max_bytes=4096).keep(captions)
    kept = KeptStates(encoder, max_bytes=4095)
    with pytest.raises(InputError, match=r"text states of 2 captions take 0\.00 GiB"):
        kept.keep(captions)
    assert len(kept) == 0
    again = KeptStates(encoder, max_bytes=4096)
    again.keep(captions)
    assert again.num_bytes == 4096
    with pytest.raises(InputError, match="shards embed"):
        again.keep(["five"])


def test_copies_share_the_states():
    kept = KeptStates(TinyTextEncoder(8))
    assert copy.deepcopy(kept) is kept
