"""Pseudo-words: read by TinyTextEncoder as words of its own are, and nothing else is read otherwise."""

import copy

import pytest
import torch

from imagen_lightning.components import build, describe
from imagen_lightning.stages.settings import TextSettings
from imagen_lightning.text import PseudoTokens, TinyTextEncoder
from imagen_lightning.types import InputError, Text, TextEncoder

CAPTION = "a <zib> left of a small red circle on a white background"


def tokens_for(encoder, words=None, init="star"):
    tokens = PseudoTokens(words or {"<zib>": 1}, init)
    tokens.attach(encoder)
    return tokens


@pytest.fixture
def encoder():
    return TinyTextEncoder(dim=24)


def test_a_word_that_begins_as_another_is_read_as_that(encoder):
    read = tokens_for(encoder).read(encoder, [CAPTION, "no such word"])
    expected = encoder([CAPTION.replace("<zib>", "star"), "no such word"])
    assert torch.equal(read.states, expected.states)
    assert torch.equal(read.mask, expected.mask)
    assert torch.equal(read.pooled, expected.pooled)


def test_several_vectors_stand_for_several_words(encoder):
    tokens = tokens_for(encoder, {"<zib>": 3, "<Ö-2>": 2}, {"<zib>": "large purple star", "<Ö-2>": "cat"})
    captions = ["a <zib>, above <ö-2><zib>"]
    read = tokens.read(encoder, captions)
    assert torch.equal(read.states, encoder(["a large purple star above cat cat large purple star"]).states)
    assert encoder.num_tokens([*captions, "a <zib>"], tokens) == [10, 4]


def test_vectors_begin_as_means_of_parts(encoder):
    tokens = tokens_for(encoder, {"<zib>": 2}, "large purple star")
    tokens.begin(encoder)
    large, purple, star = encoder.embed("large purple star")
    assert torch.equal(tokens.vectors["<zib>"].data, torch.stack([(large + purple) / 2, star]))
    assert encoder.embed("").shape == (0, 24)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("A <Zib>.", "a star"),
        ("a (<ZIB>), red", "a star red"),
        ("a<zib>b <zib>s", "a star b star s"),
        ("a <zib> , b - <zib>", "a star , b - star"),
        ("\t<zib>\n", "star"),
        ("a <foo> <zib> <zib2>", "a <foo> star <zib2>"),
        ("a << <<zib>> >", "a << star >"),
    ],
)
def test_words_are_found_wherever_they_stand(encoder, written, meant):
    assert torch.equal(tokens_for(encoder).read(encoder, [written]).states, encoder([meant]).states)


def test_composed_and_decomposed_letters_are_one_word(encoder):
    tokens = tokens_for(encoder, {"<caf\u00e9>": 1})
    assert tokens.known("a <cafe\u0301>, a <CAF\u00c9>") == ["<caf\u00e9>"] * 2


def test_captions_without_a_word_are_read_as_ever(encoder):
    captions = ["a red star", "", "an unknown <word>", "cafe\u0301 <zib"]
    with_words, without = tokens_for(encoder).read(encoder, captions), encoder(captions)
    assert torch.equal(with_words.states, without.states)
    assert torch.equal(with_words.pooled, without.pooled)


def test_a_word_beyond_the_limit_is_cut_and_counted():
    encoder = TinyTextEncoder(dim=8, max_tokens=4)
    tokens = tokens_for(encoder, {"<zib>": 3}, "large purple star")
    with pytest.warns(UserWarning, match="1 of 1 captions so far were cut to 4 words"):
        read = tokens.read(encoder, ["a red <zib>"])
    assert torch.equal(read.states, encoder(["a red large purple"]).states)
    assert encoder.num_tokens(["a red <zib>"], tokens) == [4]


def test_gradients_are_those_of_the_words_places(encoder):
    tokens = tokens_for(encoder)
    read = tokens.read(encoder, ["<zib> and <zib>", "a dog", "red <zib>"])
    weights = torch.randn(read.states.shape, generator=torch.Generator().manual_seed(0))
    (read.states * weights).sum().backward()
    expected = weights[0, 0] + weights[0, 2] + weights[2, 1]
    torch.testing.assert_close(tokens.vectors["<zib>"].grad[0], expected)


def test_a_batch_without_the_word_can_still_be_trained_on(encoder):
    tokens = tokens_for(encoder)
    read = tokens.read(encoder, ["a dog"])
    (read.pooled.sum() + read.states.sum()).backward()
    assert (tokens.vectors["<zib>"].grad == 0).all()
    with torch.no_grad():
        assert not tokens.read(encoder, [CAPTION]).states.requires_grad


def test_trained_vectors_are_never_begun_anew(encoder):
    tokens = tokens_for(encoder)
    assert tokens.vectors["<zib>"].isnan().all()
    tokens.read(encoder, ["a dog"])
    tokens.vectors["<zib>"].data.fill_(0.5)
    tokens.read(encoder, [CAPTION])
    assert (tokens.vectors["<zib>"] == 0.5).all()
    copied = copy.deepcopy(tokens)
    assert (copied.vectors["<zib>"] == 0.5).all()
    rebuilt = build(describe(tokens))
    rebuilt.attach(encoder)
    rebuilt.load_state_dict(tokens.state_dict())
    assert torch.equal(rebuilt.read(encoder, [CAPTION]).states, tokens.read(encoder, [CAPTION]).states)


def test_is_a_component():
    tokens = PseudoTokens({"<zib>": 2}, {"<zib>": "star"})
    assert describe(tokens) == {
        "class_path": "imagen_lightning.text.PseudoTokens",
        "init_args": {"words": {"<zib>": 2}, "init": {"<zib>": "star"}},
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), "at least one word"),
        (({"blorp": 1},), "'blorp' cannot be told from text; .* e.g. '<blorp>'"),
        (({"<my dog>": 1},), "e.g. '<my-dog>'"),
        (({"<a.b>": 1},), "e.g. '<a-b>'"),
        (({"<zib>": 0},), "'<zib>' has 0 vectors; give at least 1"),
        (({"<zib>": 1, "<Zib>": 1},), "differ in case alone"),
        (({"<zib>": 1}, {"<zub>": "star"}), "init names '<zub>', which is none of the pseudo-words <zib>"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        PseudoTokens(*arguments)


def test_vectors_that_nothing_sets_are_named(encoder):
    for init in (None, {}):
        with pytest.raises(InputError, match="'<zib>' has no vectors yet; give PseudoTokens an init"):
            tokens_for(encoder, init=init).read(encoder, [CAPTION])
    with pytest.raises(InputError, match="init ' ' of pseudo-word '<zib>' is no text"):
        tokens_for(encoder, init=" ").read(encoder, [CAPTION])


class Foreign(TextEncoder):
    max_tokens = 4
    name = "foreign"
    dim = 24

    def __call__(self, captions, device="cpu"):
        return Text(torch.zeros(len(captions), 1, 24), None, torch.zeros(len(captions), 24))


def test_encoders_that_cannot_read_them_are_named(encoder):
    with pytest.raises(InputError, match=r"'foreign' \(Foreign\) reads no pseudo-words; use T5TextEncoder"):
        TextSettings(Foreign(), tokens=PseudoTokens({"<zib>": 1}))
    with pytest.raises(InputError, match="pseudo-words <zib> need a text encoder"):
        TextSettings(tokens=PseudoTokens({"<zib>": 1}))
    tokens = tokens_for(encoder)
    with pytest.raises(InputError, match=r"'<zib>' has vectors of 24 features; .*'tiny-bytes-d12-s0' reads 12"):
        TextSettings(TinyTextEncoder(dim=12), tokens=tokens)
