"""What is evaluated on: shards of any photos, and captions of any text."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from imagen_lightning.data.shapes import parse_caption
from imagen_lightning.errors import InputError
from imagen_lightning.evaluation.data import _spread, load_evaluation_set, prompt_evaluation_set
from imagen_lightning.evaluation.prompts import read_prompts


def picture(number, width, height):
    pixels = np.random.default_rng(number).integers(256, size=(height, width, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def samples(bad=(), count=6):
    members = {}
    for number in range(count):
        members[f"{number}.png"] = b"no picture" if number in bad else picture(number, 12 + 3 * number, 10)
        members[f"{number}.txt"] = f"caption {number}\nanother line {number}\n".encode()
    return members


def test_photos_of_any_aspect_become_squares(tmp_path):
    data = load_evaluation_set(shard(tmp_path / "a.tar", samples()), 6, 8)
    assert data.images[:].shape == (6, 3, 8, 8)
    assert not data.has_answers
    assert all("\n" not in caption and caption.endswith(str(n)) for n, caption in enumerate(data.captions))
    again = load_evaluation_set(str(tmp_path / "a.tar"), 6, 8)
    assert (again.sha256, again.captions) == (data.sha256, data.captions)


def test_samples_that_cannot_be_used_have_stand_ins(tmp_path, caplog):
    name = shard(tmp_path / "a.tar", samples(bad=(2,)))
    data = load_evaluation_set(name, 3, 8)  # 0, 2, 4; 2 is none, and 1 stands in
    assert [caption[-1] for caption in data.captions] == ["0", "1", "4"]
    assert "1 sample of" in caplog.text
    assert "'2' in" in caplog.text
    everything = load_evaluation_set(name, 5, 8)
    assert [caption[-1] for caption in everything.captions] == ["0", "1", "3", "4", "5"]


def test_fewer_than_asked_for_are_refused(tmp_path):
    name = shard(tmp_path / "a.tar", samples(bad=(2,)))
    with pytest.raises(
        InputError, match=r"5 usable samples at 8 px, 6 are asked for \(the first: '2' in .*lower --num"
    ):
        load_evaluation_set(name, 6, 8)
    with pytest.raises(InputError, match="0 usable samples at 64 px"):
        load_evaluation_set(name, 2, 64)


def test_evenly_spaced_then_those_behind():
    assert list(_spread(10, 3)) == [0, 3, 6, 1, 4, 7, 2, 5, 8, 9]
    assert list(_spread(3, 10)) == [0, 1, 2]
    assert list(_spread(7, 7)) == list(range(7))


def test_many_images_are_read_again_instead_of_held(tmp_path, monkeypatch):
    from imagen_lightning.evaluation import image_set

    name = shard(tmp_path / "a.tar", samples())
    held = load_evaluation_set(name, 4, 8)
    monkeypatch.setattr(image_set, "LARGEST_KEPT", 0)
    read = load_evaluation_set(name, 4, 8)
    assert read.sha256 == held.sha256
    assert torch.equal(read.images[:], held.images[:])
    assert not read.images._kept


def test_text_that_utf8_lacks(tmp_path):
    members = {"0.png": picture(0, 9, 9), "0.json": b'{"caption": "a \\ud800 b"}'}
    assert load_evaluation_set(shard(tmp_path / "a.tar", members), 1, 8).captions == ["a ? b"]
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "c \ud800", "tag": "\udfff"}) + "\n")
    data = prompt_evaluation_set(read_prompts(path))
    assert data.captions == ["c ?"]
    assert data.categories == {"?": [0]}


def test_scenes_of_a_subject_half_of_them_of_pairs_never_trained_on():
    data = load_evaluation_set("shapes:hourglass", 21, 16)
    assert data.has_answers
    assert data.images[:21].shape == (21, 3, 16, 16)
    assert all("hourglass" in caption for caption in data.captions)
    unseen = [parse_caption(caption).held_out for caption in data.captions]
    assert unseen == [False] * 11 + [True] * 10
    assert data.sha256 != load_evaluation_set("shapes", 21, 16).sha256
    with pytest.raises(InputError, match="subject 'dog'"):
        load_evaluation_set("shapes:dog", 2, 16)
