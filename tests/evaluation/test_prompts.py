"""Prompt sets as they are published."""

import pytest
from given_data import given

from imagen_lightning.errors import InputError
from imagen_lightning.evaluation.prompts import read_prompts


def published(name):
    return read_prompts(given("prompts", name))


def test_partiprompts():
    found = published("PartiPrompts.tsv")
    assert len(found) == 1632  # as published
    assert found.captions[0] == "bond"
    assert len(found.rows()) == 12
    assert sum(map(len, found.rows().values())) == 1632
    assert any('"' in caption for caption in found.captions)


def test_geneval():
    found = published("geneval_metadata.jsonl")
    assert len(found) == 553  # as published
    assert list(found.rows()) == [
        "single_object", "two_object", "counting", "colors", "position", "color_attr"
    ]  # fmt: skip


def test_drawbench(tmp_path):
    path = tmp_path / "drawbench.csv"
    path.write_text('Prompts,Category\nA red car.,Colors\n"A cat, and a dog.",Counting\n', encoding="utf-8")
    found = read_prompts(path)
    assert found.captions == ["A red car.", "A cat, and a dog."]
    assert found.rows() == {"Colors": [0], "Counting": [1]}


def test_lines(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("\ufeffa red star\n\n  two   words \n", encoding="utf-8")
    found = read_prompts(path)
    assert found.captions == ["a red star", "two words"]
    assert found.rows() == {}


def test_evenly_spaced(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("prompt,category\n" + "".join(f"p{n},c{n // 5}\n" for n in range(10)), encoding="utf-8")
    assert read_prompts(path).first(4).captions == ["p0", "p2", "p5", "p7"]
    assert len(read_prompts(path).first(None)) == len(read_prompts(path).first(99)) == 10


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"id,label\n1,x\n", "no column prompt"),
        ("a.jsonl", b'{"prompt": "x"}\n{"tag": 1}\n', "line 2"),
        ("a.jsonl", b'{"prompt": 3}\n', "no text"),
        ("a.txt", b"\n \n", "no prompt"),
        ("a.txt", b"\xff\xfe", "UTF-8"),
        ("missing.tsv", None, "No such file"),
    ],
)
def test_refusals(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_prompts(tmp_path / name)
