"""Pseudo-words through T5TextEncoder against transformers itself, with words and embeddings added to its model."""

from pathlib import Path

import pytest
import torch
from given_data import copy_tokenizer

from imagen_lightning.text import PseudoTokens, T5TextEncoder

SIZES = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.1}
CAPTIONS = ["a <zib> on a mat, <b-2>.", "<zib>s and <zib>", "a cat", "", "(a<zib>)"]


def transformers():
    import transformers

    return transformers


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny-t5"
    config = transformers().T5Config(**SIZES, vocab_size=32128, feed_forward_proj="gated-gelu")
    transformers().T5EncoderModel(config).save_pretrained(folder)
    copy_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def byt5(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny-byt5"
    transformers().T5EncoderModel(transformers().T5Config(**SIZES, vocab_size=384)).save_pretrained(folder)
    transformers().ByT5Tokenizer().save_pretrained(folder)
    return folder


def make_tokens(encoder, words=None):
    tokens = PseudoTokens(words or {"<zib>": 1, "<b-2>": 1}, "a red star")
    tokens.attach(encoder)
    generator = torch.Generator().manual_seed(1)
    for vectors in tokens.vectors.values():
        vectors.data.copy_(torch.randn(vectors.shape, generator=generator))
    return tokens


def with_added_words(folder, tokens):
    """transformers' tokenizer and model, words and vectors added in its own way."""
    tokenizer = transformers().AutoTokenizer.from_pretrained(folder)
    model = transformers().T5EncoderModel.from_pretrained(folder).eval()
    tokenizer.add_tokens(list(tokens.words))
    model.resize_token_embeddings(max(len(tokenizer), model.config.vocab_size))
    for word, vectors in tokens.vectors.items():
        model.get_input_embeddings().weight.data[tokenizer.convert_tokens_to_ids(word)] = vectors.data[0]
    return tokenizer, model


@pytest.mark.parametrize("folder", ["t5", "byt5"])
def test_states_are_those_of_a_model_with_added_words(folder, request):
    folder = request.getfixturevalue(folder)
    encoder = T5TextEncoder(str(folder), max_tokens=40)
    tokens = make_tokens(encoder)
    tokenizer, model = with_added_words(folder, tokens)
    with torch.no_grad():
        text = tokens.read(encoder, CAPTIONS)
        for row, caption in enumerate(CAPTIONS):
            expected = model(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0]
            assert text.mask[row].sum() == len(expected)
            torch.testing.assert_close(text.states[row, : len(expected)], expected, rtol=1e-4, atol=1e-5)
            assert encoder.num_tokens([caption], tokens) == [len(expected)]
        # Padded to max_tokens, as DeepFloyd IF reads it.
        padded = T5TextEncoder(str(folder), max_tokens=40, padding="attended")
        given = tokenizer(CAPTIONS, padding="max_length", max_length=40, return_tensors="pt")
        expected = model(**given).last_hidden_state
        text = tokens.read(padded, CAPTIONS)
        assert text.mask is None
        torch.testing.assert_close(text.states, expected, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_added_embeddings(t5):
    encoder = T5TextEncoder(str(t5))
    tokens = make_tokens(encoder)
    tokenizer, model = with_added_words(t5, tokens)
    text = tokens.read(encoder, CAPTIONS[:2])
    weights = torch.randn(text.states.shape, generator=torch.Generator().manual_seed(2)) * text.mask.unsqueeze(-1)
    (text.states * weights).sum().backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in encoder._model.parameters())
    model.requires_grad_(False).get_input_embeddings().weight.requires_grad_()
    for row, caption in enumerate(CAPTIONS[:2]):
        states = model(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0]
        (states * weights[row, : len(states)]).sum().backward()
    for word, vectors in tokens.vectors.items():
        expected = model.get_input_embeddings().weight.grad[tokenizer.convert_tokens_to_ids(word)]
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(vectors.grad[0], expected, rtol=1e-3, atol=1e-5)


def test_a_word_of_several_vectors_takes_as_many_places(t5):
    encoder = T5TextEncoder(str(t5))
    three = PseudoTokens({"<zib>": 3}, "red star")
    three.attach(encoder)
    three.begin(encoder)
    pieces = encoder.embed("red star")
    assert len(pieces) == 2  # and so the third vector is the first again
    assert torch.equal(three.vectors["<zib>"].data, pieces[[0, 1, 0]])
    *article, end = encoder._tokenize(["a"])[0]
    assert encoder._tokenize(["a <zib>"], three) == [[*article, -1, -2, -3, end]]
    two = PseudoTokens({"<zib>": 2}, "red star")
    two.attach(encoder)
    with torch.no_grad():
        read, expected = two.read(encoder, ["a <Zib> on a mat"]), encoder(["a red star on a mat"])
    torch.testing.assert_close(read.states, expected.states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", ["masked", "attended"])
def test_captions_without_a_word_are_read_as_ever(t5, padding):
    encoder = T5TextEncoder(str(t5), max_tokens=16, padding=padding)
    captions = ["a cat", "", "an unknown <word> and <b>bold</b>"]
    with torch.no_grad():
        read, expected = make_tokens(encoder).read(encoder, captions), encoder(captions)
    assert torch.equal(read.states, expected.states)
    assert torch.equal(read.pooled, expected.pooled)


def test_a_long_caption_is_cut_before_its_end_mark(byt5):
    encoder = T5TextEncoder(str(byt5), max_tokens=6)
    tokens = make_tokens(encoder, {"<zib>": 4})
    with pytest.warns(UserWarning, match="1 of 3 captions so far were cut to 6 tokens"):
        rows = encoder._tokenize(["ab<zib>", "a<zib>", "abcd"], tokens)
    assert rows == [[100, 101, -1, -2, -3, 1], [100, -1, -2, -3, -4, 1], [100, 101, 102, 103, 1]]
    assert encoder.num_tokens(["ab<zib>", "a<zib>", "abcd"], tokens) == [6, 6, 5]


def test_cleaning_leaves_the_words(byt5):
    cleaned, plain = (T5TextEncoder(str(byt5), clean_captions=clean) for clean in (True, False))
    tokens = make_tokens(plain)
    with torch.no_grad():
        read = tokens.read(cleaned, ["<p>a &lt;Zib&gt; <b-2>bold</b-2> <b>IMG_1.jpg</b>"])
        assert torch.equal(read.states, tokens.read(plain, ["a <zib> <b-2>bold"]).states)


def test_words_in_lower_case_are_the_words(byt5):
    lower, plain = (T5TextEncoder(str(byt5), clean_captions=clean) for clean in ("lowercase", False))
    tokens = make_tokens(plain, {"<Zib>": 1})
    with torch.no_grad():
        states = tokens.read(lower, [" A <ZIB> on a Mat "]).states
        assert torch.equal(states, tokens.read(plain, ["a <Zib> on a mat"]).states)


def test_vectors_stay_float32_beside_an_encoder_of_less(byt5):
    encoder = T5TextEncoder(str(byt5), dtype="bfloat16")
    tokens = make_tokens(encoder)
    with torch.autocast("cpu", torch.bfloat16):
        text = tokens.read(encoder, ["a <zib>"])
    assert text.states.dtype == torch.float32
    text.states.sum().backward()
    assert tokens.vectors["<zib>"].grad.dtype == torch.float32
    assert tokens.vectors["<zib>"].grad.abs().max() > 0
    assert (tokens.vectors["<b-2>"].grad == 0).all()
