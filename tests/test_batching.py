"""Texts of different lengths in one batch, and batches that move."""

import pytest
import torch

from imagen_lightning.text.batching import join_texts, pad_text, replace_texts
from imagen_lightning.types import Batch, Conditioning, Text


def make_text(batch, length, masked=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = None
    if masked:
        mask = torch.rand(batch, length, generator=generator) < 0.7
        mask[:, 0] = True
    states = torch.randn(batch, length, 3, generator=generator)
    return Text(states, mask, torch.randn(batch, 3, generator=generator))


def tokens(text):
    """The states of each row that count, which is all that a text says beside its pooled vectors."""
    masks = text.mask if text.mask is not None else torch.ones(text.states.shape[:2], dtype=torch.bool)
    return [states[mask] for states, mask in zip(text.states, masks)]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("masked", [True, False])
def test_padding_adds_tokens_that_do_not_count(masked):
    text = make_text(2, 3, masked)
    padded = pad_text(text, 5)
    assert padded.states.shape == (2, 5, 3)
    assert padded.mask.shape == (2, 5)
    assert not padded.mask[:, 3:].any()
    assert same(tokens(padded), tokens(text))
    assert torch.equal(padded.pooled, text.pooled)
    assert pad_text(text, 3) is text
    assert pad_text(text, 2) is text


LENGTHS = [(3, 3), (2, 5), (5, 2)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("masked", [(True, True), (False, False), (True, False), (False, True)])
def test_joined_texts_are_the_rows_of_both(lengths, masked):
    first, second = make_text(2, lengths[0], masked[0]), make_text(3, lengths[1], masked[1], seed=1)
    joined = join_texts(first, second)
    assert len(joined) == 5
    assert same(tokens(joined), tokens(first) + tokens(second))
    assert torch.equal(joined.pooled, torch.cat([first.pooled, second.pooled]))
    assert (joined.mask is None) == (masked == (False, False) and lengths == (3, 3))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("masked", [(True, True), (False, False), (True, False), (False, True)])
def test_replaced_texts_are_the_other_at_their_rows_alone(lengths, masked):
    text, other = make_text(4, lengths[0], masked[0]), make_text(1, lengths[1], masked[1], seed=1)
    where = torch.tensor([False, True, True, False])
    result = replace_texts(text, other, where)
    expected = [tokens(other)[0] if here else row for here, row in zip(where, tokens(text))]
    assert same(tokens(result), expected)
    assert torch.equal(result.pooled, torch.where(where[:, None], other.pooled, text.pooled))
    assert same(tokens(replace_texts(text, other, torch.zeros(4, dtype=torch.bool))), tokens(text))


def test_replacement_keeps_the_dtype_and_passes_the_gradient():
    text, other = make_text(2, 2).to(torch.bfloat16), make_text(1, 1)
    other.states.requires_grad_()
    result = replace_texts(text, other, torch.tensor([True, False]))
    assert result.states.dtype == result.pooled.dtype == torch.bfloat16
    result.states.sum().backward()
    assert other.states.grad.abs().sum() > 0


def test_a_batch_moves_with_all_its_tensors():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    batch = Batch(images, ["a", "b"], ["k", "l"], torch.arange(2), make_text(2, 3), weights=torch.tensor([1.0, 2.0]))
    moved = batch.to("meta", non_blocking=True)
    for value in (moved.images, moved.positions, moved.weights, moved.text.states, moved.text.mask, moved.text.pooled):
        assert value.device.type == "meta"
    assert moved.captions == ["a", "b"]
    assert batch.images.device.type == "cpu"
    half = batch.to(torch.float16)
    assert half.text.states.dtype == torch.float16
    assert (half.images.dtype, half.positions.dtype, half.text.mask.dtype) == (torch.uint8, torch.int64, torch.bool)
    assert len(batch) == len(batch.text) == 2
    assert Batch(images, [], [], torch.arange(2)).to("meta").text is None
    assert Batch(images, [], [], torch.arange(2)).to("meta").weights is None


def test_a_conditioning_moves_its_text():
    conditioning = Conditioning(make_text(2, 3), torch.zeros(2, 3, 4, 4), torch.zeros(2))
    moved = conditioning.to("meta")
    assert moved.text.states.device.type == moved.low_res.device.type == moved.aug_level.device.type == "meta"
