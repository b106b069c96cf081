"""`shards doctor`: its page in a browser, the summary, stages from YAML, refusals."""

import io

import numpy as np
import pytest
import yaml
from given_data import copy_tokenizer
from PIL import Image

from imagen_lightning.cli.main import main
from imagen_lightning.data.shards import ShardWriter


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seeds in (("train", range(30)), ("heldout", (3, 90))):
        with ShardWriter(tmp_path, name, 100) as writer:
            for seed in seeds:
                noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(noise).resize((80, 70 + seed)).save(buffer, "PNG")
                data = buffer.getvalue()[: 300 if seed == 5 else None]
                caption = f"<script>alert({seed})</script> a picture of noise".encode()
                writer.write(f"{seed:03d}", {"png": data, "txt": caption, "json": b'{"similarity": 0.3}'})
    return tmp_path


def run(*arguments):
    return main(["shards", "doctor", *arguments])


def test_the_page_and_the_summary(shards, capsys, visit):
    stage = "quickstart/base.yaml"
    command = ("train-*.tar", "--held-out", "heldout-*.tar", "--stage", stage, "--stage", "128", "--workers", "0")
    assert run(*command) == 0
    out = capsys.readouterr().out
    assert "29 usable samples in 1 shard, 1 cannot be used" in out
    assert "1 of 2 held-out images leak" in out
    assert "base (16 px): 100.0% of the images are large enough; 0.0% of captions beyond 32 tokens" in out
    page = visit(shards / "doctor.html")
    for section in ("advice", "samples", "sizes", "captions", "metadata", "copies", "skips"):
        page.locator(f"#{section}").scroll_into_view_if_needed()
    page.wait_for_function("() => document.querySelectorAll('.plot .bars path').length > 10")
    assert page.locator(".plot").count() == page.locator(".plot .main-svg .bars").count()
    assert page.evaluate("() => [...document.images].every(image => image.naturalWidth > 0)")
    text = page.inner_text("body")
    assert "<script>alert(3)</script> a picture of noise" in text
    assert "truncated image" in text
    assert run(*command) == 0  # a page may be written anew


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere-*.tar",), "match no file"),
        (("train-*.tar", "--stage", "nowhere.yaml"), "nowhere.yaml"),
        (("train-*.tar", "--stage", "notes.yaml"), "not a stage's YAML"),
        (("train-*.tar", "--stage", "9" * 5000), "too long"),
        (("train-*.tar", "--out", "notes.yaml"), "notes.yaml"),
    ],
)
def test_refusals(shards, capsys, arguments, words):
    (shards / "notes.yaml").write_text("a: 1\n")
    assert run(*arguments) == 2
    assert words in capsys.readouterr().err
    assert not (shards / "doctor.html").exists()
    assert (shards / "notes.yaml").read_text() == "a: 1\n"


@pytest.mark.parametrize("padding", ["masked", "attended"])
def test_tokens_are_counted_without_padding(shards, capsys, padding):
    """`a picture of noise` and the script around the seed are more than 8 tokens and fewer than 77."""
    folder = shards / "t5"
    folder.mkdir()
    copy_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "t5", "d_model": 8, "vocab_size": 32128}')
    for max_tokens, share in ((77, "0.0%"), (8, "100.0%")):
        arguments = {"name_or_path": str(folder), "max_tokens": max_tokens, "padding": padding}
        encoder = {"class_path": "imagen_lightning.text.T5TextEncoder", "init_args": arguments}
        config = {"model": {"init_args": {"image_size": 16, "text": {"encoder": encoder}}}}
        (shards / "stage.yaml").write_text(yaml.safe_dump(config))
        assert run("train-*.tar", "--stage", "stage.yaml", "--workers", "0") == 0
        assert f"{share} of captions beyond {max_tokens} tokens" in capsys.readouterr().out
