"""TransformerEncoder: padding does not matter, order does, every part learns."""

import pytest
import torch

from imagen_lightning.components import build, describe
from imagen_lightning.text import TinyTextEncoder, TransformerEncoder
from imagen_lightning.types import InputError, Text

CAPTIONS = ["a red star", "a small blue circle above a large star", ""]


@pytest.fixture
def encoder() -> TransformerEncoder:
    torch.manual_seed(0)
    return TransformerEncoder(16, dim=24, num_layers=2, num_heads=3, max_tokens=16).eval()


@pytest.fixture
def text() -> Text:
    return TinyTextEncoder(dim=16)(CAPTIONS)


def test_shapes(encoder, text):
    out = encoder(text)
    assert out.states.shape == (3, 8, 24)
    assert out.mask is text.mask
    assert (out.states[~text.mask] == 0).all()
    torch.testing.assert_close(out.pooled[0], out.states[0, :3].mean(0))


def test_padding_does_not_change_the_result(encoder, text):
    alone = encoder(TinyTextEncoder(dim=16)(CAPTIONS[:1]))
    out = encoder(text)
    torch.testing.assert_close(out.states[0, :3], alone.states[0, :3])
    torch.testing.assert_close(out.pooled[0], alone.pooled[0])
    noisy = Text(torch.where(text.mask[..., None], text.states, torch.randn_like(text.states)), text.mask, text.pooled)
    torch.testing.assert_close(encoder(noisy).states, out.states)


def test_no_mask_attends_to_every_token(encoder, text):
    full = Text(text.states, torch.ones_like(text.mask), text.pooled)
    without = Text(text.states, None, text.pooled)
    out = encoder(without)
    assert out.mask is None
    torch.testing.assert_close(out.states, encoder(full).states)
    torch.testing.assert_close(out.pooled, out.states.mean(1))


def test_no_token_at_all_stays_finite(encoder, text):
    out = encoder(Text(text.states, torch.zeros_like(text.mask), text.pooled))
    assert (out.states == 0).all()
    assert (out.pooled == 0).all()


def test_captions_do_not_see_each_other(encoder, text):
    order = torch.tensor([2, 0, 1])
    turned = encoder(Text(text.states[order], text.mask[order], text.pooled[order]))
    torch.testing.assert_close(turned.states, encoder(text).states[order])


def test_order_of_tokens_matters(encoder):
    states = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 4, dtype=torch.bool)
    forward, backward = (encoder(Text(s, mask, s.mean(1))) for s in (states, states.flip(1)))
    assert (forward.states - backward.states.flip(1)).abs().max() > 0.05
    with torch.no_grad():
        encoder.positions.zero_()
    forward, backward = (encoder(Text(s, mask, s.mean(1))) for s in (states, states.flip(1)))
    torch.testing.assert_close(forward.states, backward.states.flip(1))


def test_tokens_see_each_other(encoder):
    one, two = TinyTextEncoder(dim=16)(["a red star", "a blue star"]).states
    mask = torch.ones(1, 4, dtype=torch.bool)
    last = [encoder(Text(s[None], mask, s[None].mean(1))).states[0, 2] for s in (one, two)]
    assert (last[0] - last[1]).abs().max() > 0.01


def test_every_parameter_gets_a_gradient(encoder, text):
    out = encoder(text)
    (out.states.square().sum() + out.pooled.sin().sum()).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_it_learns_word_order(text):
    torch.manual_seed(0)
    encoder = TransformerEncoder(16, dim=16, num_layers=1, num_heads=2, max_tokens=8)
    head = torch.nn.Linear(16, 1)
    batch = TinyTextEncoder(dim=16)(["red star above blue circle", "blue circle above red star"])
    target = torch.tensor([0.0, 1.0])
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=1e-2)
    for _ in range(40):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(head(encoder(batch).pooled)[:, 0], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_dropout_acts_in_training_alone(text):
    torch.manual_seed(0)
    encoder = TransformerEncoder(16, dim=24, num_heads=3, max_tokens=16, dropout=0.5)
    assert not torch.equal(encoder(text).states, encoder(text).states)
    encoder.eval()
    assert torch.equal(encoder(text).states, encoder(text).states)


def test_is_a_component(encoder):
    again = build(describe(encoder))
    assert describe(again) == describe(encoder)
    again.load_state_dict(encoder.state_dict())


def test_bad_input(encoder, text):
    with pytest.raises(InputError, match="16 features but TransformerEncoder input_dim is 20"):
        TransformerEncoder(20)(text)
    with pytest.raises(InputError, match="8 tokens is longer than TransformerEncoder max_tokens 4"):
        TransformerEncoder(16, max_tokens=4)(text)
    with pytest.raises(InputError, match="num_heads 5"):
        TransformerEncoder(16, dim=24, num_heads=5)
    with pytest.raises(InputError, match=r"dropout 1\.5"):
        TransformerEncoder(16, dropout=1.5)
