"""Files of text states: against the encoder and the safetensors library, and what is wrong with damaged ones."""

import copy
import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors
import torch
from safetensors.numpy import load_file, save_file

from imagen_lightning.io.atomic import temporary_path
from imagen_lightning.text import TinyTextEncoder
from imagen_lightning.text.cached import StatesFile, StatesWriter, caption_digest, dequantize, quantize, stored_bytes
from imagen_lightning.text.identity import PROBES, difference, digest_tokens, digest_weights
from imagen_lightning.types import InputError, Text

CAPTIONS = ["a red star", "", "two cats on a green mat", "a dog", "crème brûlée", "lone \ud800 surrogate"]


def store(path, dtype="float16", captions=CAPTIONS, encoder=None, batch=2, **metadata):
    encoder = encoder or TinyTextEncoder(24)
    num_tokens = dict(zip(captions, encoder.num_tokens(captions)))
    with StatesWriter(path, num_tokens, encoder.dim, dtype, {"mask": "tokens", **metadata}) as writer:
        for begin in range(0, len(captions), batch):
            part = captions[begin : begin + batch]
            writer.write(part, encoder(part))
    return StatesFile(path)


def test_states_come_back_as_the_encoder_gives_them(tmp_path):
    states = store(tmp_path / "a.safetensors")
    assert (states.num_captions, states.dim) == (6, 24)
    encoder = TinyTextEncoder(24)
    for caption in CAPTIONS:
        text, live = states.read(caption), encoder([caption])
        kept = live.states[:, live.mask[0]]
        assert text.mask.shape == kept.shape[:2]
        assert text.mask.all()
        assert torch.equal(text.states, kept.half().float())
        rounding = kept.abs().max().item() * 2**-11  # of float16; a mean errs no more than its parts
        torch.testing.assert_close(text.pooled, live.pooled, rtol=0, atol=rounding)
        assert text.pooled.dtype == text.states.dtype == torch.float32
    assert states.read("a red  star") is None


def test_int8_is_within_half_a_step_of_each_token(tmp_path):
    states = store(tmp_path / "a.safetensors", "int8")
    encoder = TinyTextEncoder(24)
    for caption in CAPTIONS:
        live = encoder([caption])
        kept = live.states[0, live.mask[0]]
        step = kept.abs().amax(1, keepdim=True) / 127
        assert ((states.read(caption).states[0] - kept).abs() <= 0.5001 * step).all()


def test_quantize_closed_form():
    states = np.array([[0.0, 127.0, -63.5], [0.0, 0.0, 0.0], [2.54, -1.26, 0.0]], dtype=np.float32)
    stored, scales = quantize(states)
    np.testing.assert_allclose(scales, [1, 0, 0.02], rtol=1e-6)
    assert stored.tolist() == [[0, 127, -64], [0, 0, 0], [127, -63, 0]]
    assert np.abs(dequantize(stored, scales) - states).max() <= 0.5
    assert (dequantize(stored, scales)[1] == 0).all()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_the_file_is_one_of_the_safetensors_library(tmp_path, dtype):
    path = tmp_path / "a.safetensors"
    states = store(path, dtype, encoder_is="tiny")
    tensors = load_file(path)
    assert set(tensors) == {"offsets", "states", "captions"} | ({"scales"} if dtype == "int8" else set())
    digests = [hashlib.sha256(c.encode("utf-8", "replace")).digest()[:16] for c in CAPTIONS]
    assert [row.tobytes() for row in tensors["captions"]] == sorted(digests)
    number = sorted(digests).index(digests[2])
    rows = tensors["states"][tensors["offsets"][number] : tensors["offsets"][number + 1]]
    assert len(rows) == 6
    assert rows.dtype == dtype
    if dtype == "float16":
        assert np.array_equal(rows.astype(np.float32), states.read(CAPTIONS[2]).states[0].numpy())
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == states.metadata
    assert states.metadata["encoder_is"] == "tiny"
    size = sum(array.nbytes for array in tensors.values())
    assert stored_bytes(len(CAPTIONS), int(tensors["offsets"][-1]), 24, dtype) == size


def test_attended_padding_has_no_mask(tmp_path):
    encoder = TinyTextEncoder(8)
    given = encoder(["a red star"])
    with StatesWriter(tmp_path / "a.safetensors", {"a red star": 4}, 8, "float16", {"mask": "none"}) as writer:
        writer.write(["a red star"], Text(given.states, None, given.pooled))
    text = StatesFile(tmp_path / "a.safetensors").read("a red star")
    assert text.mask is None
    assert torch.equal(text.states, given.states.half().float())
    torch.testing.assert_close(text.pooled, text.states.mean(1))


def test_a_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(KeyError), StatesWriter(path, {"a": 1, "b": 1}, 4, "float16", {}) as writer:
        writer.write(["other"], TinyTextEncoder(4)(["other"]))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match=r"1 captions of .* were not written"):
        store_some(path, {"a": 1, "b": 1}, ["a"])
    with pytest.raises(RuntimeError, match=r"caption 'a' has states \(1, 4\), not \(3, 4\)"):
        store_some(path, {"a": 3}, ["a"])
    assert list(tmp_path.iterdir()) == []


def store_while_another_does(path):
    with StatesWriter(path, {"a": 1}, 4, "float16", {}) as writer:
        writer.write(["a"], TinyTextEncoder(4)(["a"]))
        store_some(path, {"a": 1}, ["a"])


def store_some(path, num_tokens, captions, dim=4):
    with StatesWriter(path, num_tokens, dim, "float16", {}) as writer:
        writer.write(captions, TinyTextEncoder(dim)(captions))


def test_what_a_killed_writer_left_is_removed_and_a_second_writer_is_none(tmp_path):
    path = tmp_path / "a.safetensors"
    temporary_path(path).write_bytes(b"x" * 10_000)
    store_some(path, {"a": 1}, ["a"])
    assert [item.name for item in tmp_path.iterdir()] == ["a.safetensors"]
    store_while_another_does(path)
    assert [item.name for item in tmp_path.iterdir()] == ["a.safetensors"]
    assert StatesFile(path).read("a") is not None


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (float("nan"), "int8", "NaN or infinite states for caption 'a'"),
        (float("inf"), "float16", "NaN or infinite states for caption 'a'"),
        (70000.0, "float16", "70000 is too large for float16 .*store int8"),
    ],
)
def test_states_that_cannot_be_stored_are_refused(tmp_path, value, dtype, message):
    text = Text(torch.full((1, 1, 4), value), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 4))
    with (
        pytest.raises(InputError, match=message),
        StatesWriter(tmp_path / "a.safetensors", {"a": 1}, 4, dtype, {}) as writer,
    ):
        writer.write(["a"], text)
    assert list(tmp_path.iterdir()) == []


def test_int8_holds_what_float16_cannot(tmp_path):
    text = Text(torch.full((1, 1, 4), 70000.0), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 4))
    with StatesWriter(tmp_path / "a.safetensors", {"a": 1}, 4, "int8", {}) as writer:
        writer.write(["a"], text)
    torch.testing.assert_close(StatesFile(tmp_path / "a.safetensors").read("a").states, text.states)


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    store(path)
    whole = path.read_bytes()
    for cut in range(0, len(whole), 97):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"a\.safetensors' (holds no text states|are truncated)"):
            StatesFile(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(InputError, match="truncated"):
        StatesFile(path)
    path.write_bytes(whole.replace(b'"version": "1"', b'"version": "9"'))
    with pytest.raises(InputError, match="format '9'"):
        StatesFile(path)
    save_file({"weight": np.zeros((2, 2))}, path)
    with pytest.raises(InputError, match="holds no text states"):
        StatesFile(path)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        StatesFile(tmp_path / "b.safetensors")


def test_a_file_cut_while_it_is_read_is_an_error_and_no_crash(tmp_path):
    states = store(tmp_path / "a.safetensors")
    states.read("a dog")
    os.truncate(states.path, os.path.getsize(states.path) // 2)
    with pytest.raises(OSError, match="shorter than it was"):
        [states.read(caption) for caption in CAPTIONS]


def test_it_is_read_by_offset_and_may_be_closed_and_sent(tmp_path, monkeypatch):
    states = store(tmp_path / "a.safetensors")
    first = states.read("a dog").states
    reads, pread = [], os.pread

    def watched(descriptor, length, offset):
        reads.append(length)
        return pread(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", watched)
    assert torch.equal(states.read("a dog").states, first)
    assert reads == [2 * 24 * 2]  # two words of 24 features
    states.close()
    assert torch.equal(states.read("a dog").states, first)
    sent = copy.deepcopy(states)
    assert len(sent._captions) + len(sent._offsets) == 1  # the table is read again there, not sent
    assert torch.equal(sent.read("a dog").states, first)


def test_weights_are_told_apart_by_samples(tmp_path):
    assert digest_weights(tmp_path) == ""
    generator = np.random.default_rng(0)
    data = generator.bytes(40_000_000)
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(data)
    digest = digest_weights(tmp_path)
    assert len(digest) == 16
    for place in (0, len(data) // 3, len(data) - 100_000):  # one tensor of 100 kB trained further
        file.write_bytes(data[:place] + generator.bytes(100_000) + data[place + 100_000 :])
        assert digest_weights(tmp_path) != digest
    file.write_bytes(data[:-1])
    assert digest_weights(tmp_path) != digest
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    own = digest_weights(tmp_path)
    file.unlink()
    assert digest_weights(tmp_path) == own  # safetensors come first


def test_difference():
    stored = {"encoder": "a", "max_tokens": "8", "weights": "1", "precision": "float32", "more": "x"}
    assert difference(stored, {"encoder": "a", "max_tokens": "8", "weights": "1"}) is None
    assert difference(stored, {"encoder": "a", "weights": ""}) is None
    assert difference({"encoder": "a"}, {"encoder": "a", "weights": "2"}) is None
    assert difference(stored, {"encoder": "a", "weights": "2"}) == ("weights", "1", "2")
    assert difference(stored, {"encoder": "b", "max_tokens": "9"}) == ("encoder", "a", "b")
    assert difference(stored, {"precision": "float16"}, ignore=("precision",)) is None
    assert difference(stored, {"padding": "masked"}) == ("padding", "", "masked")


def test_probes_tell_orders_and_cuts_apart():
    assert digest_tokens([[1, 2], [3]]) != digest_tokens([[1], [2, 3]])
    assert len(set(PROBES)) == len(PROBES)
    assert all(len(caption_digest(probe)) == 16 for probe in PROBES)


def test_reading_states_imports_no_transformers():
    code = "import sys, imagen_lightning.text.cached; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
