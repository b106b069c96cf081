"""Files of pseudo-words: what is saved comes back, and what does not belong is refused with both sides."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from imagen_lightning.stages.settings import TextSettings
from imagen_lightning.text import PseudoTokens, TinyTextEncoder, token_files
from imagen_lightning.types import InputError

WORDS = {"<zib>": 2, "<Café-x>": 1}


@pytest.fixture
def encoder():
    return TinyTextEncoder(dim=8)


@pytest.fixture
def tokens(encoder):
    made = PseudoTokens(WORDS, "star")
    made.attach(encoder)
    for number, vectors in enumerate(made.vectors.values()):
        vectors.data.normal_(generator=torch.Generator().manual_seed(number))
    return made


@pytest.fixture
def path(tmp_path, tokens, encoder):
    token_files.save_tokens(tmp_path / "zib.tokens.safetensors", tokens, encoder, licence="CC0-1.0")
    return tmp_path / "zib.tokens.safetensors"


class Stage:
    """As much of a stage as has words."""

    def __init__(self, encoder, tokens=None):
        self.text = TextSettings(encoder, tokens=tokens)

    def attach_tokens(self, tokens):
        known = self.text.tokens
        self.text = TextSettings(self.text.encoder, tokens=known.joined(tokens) if known is not None else tokens)


def test_what_is_saved_comes_back(path, tokens, encoder):
    file = token_files.read_tokens(path)
    assert file.licence == "CC0-1.0"
    assert file.identity == encoder.identity()
    read = file.tokens(encoder)
    assert read.words == WORDS
    captions = ["a <zib> and a <café-X>", "a dog"]
    assert torch.equal(read.read(encoder, captions).states, tokens.read(encoder, captions).states)
    assert os.stat(path).st_mode & 0o044 == 0o044 & ~_umask()
    assert not list(path.parent.glob("*.partial"))


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_chosen_words_alone_are_saved(tmp_path, tokens, encoder):
    one = tmp_path / "one.tokens.safetensors"
    token_files.save_tokens(one, tokens, encoder, ["<ZIB>"])
    assert list(load_file(one)) == ["<zib>"]
    with pytest.raises(InputError, match="knows no pseudo-word '<zub>'; it knows <zib>, <Café-x>"):
        token_files.save_tokens(tmp_path / "two.tokens.safetensors", tokens, encoder, ["<zub>"])


def test_a_file_of_one_word_is_a_textual_inversion_of_diffusers(tmp_path, tokens, encoder):
    loaders = pytest.importorskip("diffusers.loaders.textual_inversion")
    token_files.save_tokens(tmp_path / "one.tokens.safetensors", tokens, encoder, ["<zib>"])
    states = loaders.load_textual_inversion_state_dicts(
        [str(tmp_path)], weight_name="one.tokens.safetensors", local_files_only=True
    )
    tokenizer = SimpleNamespace(get_vocab=dict, added_tokens_encoder={})
    mixin = loaders.TextualInversionLoaderMixin
    words, vectors = mixin._retrieve_tokens_and_embeddings([None], states, tokenizer)
    words, vectors = mixin._extend_tokens_and_embeddings(words, vectors, tokenizer)
    assert words == ["<zib>", "<zib>_1"]
    assert torch.equal(torch.stack(vectors), tokens.vectors["<zib>"].data)


def test_every_stage_of_the_encoder_gets_the_words(path, tokens, encoder):
    trained, other = Stage(encoder, tokens), Stage(TinyTextEncoder(dim=8))
    foreign, silent = Stage(TinyTextEncoder(dim=8, seed=1)), Stage(None)
    assert token_files.add_tokens([trained, other, foreign, silent], path) == list(WORDS)
    assert trained.text.tokens is tokens
    captions = ["a <zib> and a <Café-x>"]
    states = other.text.encode(captions, torch.device("cpu")).states
    assert torch.equal(states, tokens.read(encoder, captions).states)
    assert foreign.text.tokens is None
    assert silent.text.tokens is None


def test_words_join_those_that_are_there(path, encoder):
    earlier = PseudoTokens({"<old>": 1}, "circle")
    stage = Stage(encoder, earlier)
    token_files.add_tokens([stage], path)
    assert stage.text.tokens.words == {"<old>": 1, **WORDS}
    assert stage.text.tokens.vectors["<old>"] is earlier.vectors["<old>"]
    assert torch.equal(stage.text.encode(["<old>"], "cpu").states, encoder(["circle"]).states)
    with pytest.raises(InputError, match=r"'<Old>' is known to the stage already \(it knows <old>, <zib>"):
        stage.text.tokens.joined(PseudoTokens({"<Old>": 1}))


def test_a_word_with_other_vectors_is_refused(path, encoder):
    other = PseudoTokens({"<ZIB>": 2}, "star")
    with pytest.raises(
        InputError, match=r"'<zib>' of .*zib\.tokens.safetensors' is known to a stage already, by other"
    ):
        token_files.add_tokens([Stage(encoder, other)], path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (TinyTextEncoder(dim=8, seed=1), "encoder is 'tiny-bytes-d8-s0' there and 'tiny-bytes-d8-s1' here"),
        (TinyTextEncoder(dim=12), "encoder is 'tiny-bytes-d8-s0' there and 'tiny-bytes-d12-s0' here"),
        (TinyTextEncoder(dim=8, max_tokens=7), "max_tokens is '32' there and '7' here"),
        (None, "no stage reads text"),
    ],
)
def test_another_encoder_width_or_length_is_refused(path, other, message):
    with pytest.raises(InputError, match=message):
        token_files.add_tokens([Stage(other)], path)


def test_names_and_files_that_are_there_are_refused(path, tokens, encoder):
    with pytest.raises(InputError, match="is there already"):
        token_files.save_tokens(path, tokens, encoder)
    for name in ("zib.safetensors", "zib", ".tokens.safetensors"):
        with pytest.raises(InputError, match=r"must be named NAME\.tokens\.safetensors"):
            token_files.save_tokens(path.parent / name, tokens, encoder)
    below = path / "zib.tokens.safetensors"
    with pytest.raises(InputError, match=r"cannot be written: (Not a directory|File exists)"):
        token_files.save_tokens(below, tokens, encoder)


def test_untrained_vectors_are_not_saved(tmp_path, encoder):
    untrained = PseudoTokens({"<zib>": 1}, "star")
    untrained.attach(encoder)
    with pytest.raises(InputError, match="'<zib>' are not trained"):
        token_files.save_tokens(tmp_path / "zib.tokens.safetensors", untrained, encoder)
    assert not list(tmp_path.iterdir())


def rewritten(path, tensors=None, **metadata):
    tensors = tensors or {"<zib>": torch.zeros(1, 8)}
    good = {"format": token_files.FORMAT, "version": "1", "dim": "8", "identity": json.dumps({"encoder": "e"})}
    good["words"] = json.dumps(list(tensors))
    path.unlink()
    save_file(tensors, path, metadata=good | metadata)
    return path


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (None, {"format": "other"}, "not written by `imagen-lightning tokens`"),
        (None, {"version": "2"}, "is of format '2'; this version reads '1'"),
        (None, {"dim": "9"}, "do not agree"),
        (None, {"identity": "[]"}, "do not agree"),
        (None, {"identity": "{"}, "do not agree"),
        (None, {"words": '["<zub>"]'}, "do not agree"),
        (None, {"words": "{"}, "do not agree"),
        ({"<zib>": torch.zeros(8)}, {}, "do not agree"),
        ({"<zib>": torch.full((1, 8), torch.nan)}, {}, "do not agree"),
        ({"<zib>": torch.zeros(1, 8, dtype=torch.int64)}, {}, "do not agree"),
    ],
)
def test_files_that_are_none_are_refused(path, tensors, metadata, message):
    with pytest.raises(InputError, match=message):
        token_files.read_tokens(rewritten(path, tensors, **metadata))


def test_a_word_that_none_could_write_is_refused(path, encoder):
    file = token_files.read_tokens(
        rewritten(path, {"star": torch.zeros(1, 8)}, identity=json.dumps(encoder.identity()))
    )
    with pytest.raises(InputError, match="'star' cannot be told from text"):
        file.tokens(encoder)


def test_missing_and_damaged_files_are_refused(path):
    with pytest.raises(InputError, match="does not exist"):
        token_files.read_tokens(path.parent / "none.tokens.safetensors")
    data = path.read_bytes()
    for damaged in (data[:-1], data[:20], b"", b"\x80\x04junk" * 9):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="is damaged"):
            token_files.read_tokens(path)
