"""What the doctor finds in shards made with known faults, copies and leaks."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from imagen_lightning.data.doctor import NEAR, Stage, Usable, alike, examine
from imagen_lightning.data.shards import ShardWriter
from imagen_lightning.errors import InputError
from imagen_lightning.report.doctor_page import summary


def picture(seed, size=(96, 64)):
    noise = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(image, format_="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path):
    """20 pictures of 96x64 in two shards, and as samples 20 to 24: a copy, a re-encoded look-alike, a small one, one
    cut off, one without a caption; held out are a blurred copy of picture 3 and a picture of its own."""
    (tmp_path / "train").mkdir()
    with ShardWriter(tmp_path / "train", "train", 13) as writer:
        for number in range(20):
            members = {"png": encoded(picture(number)), "txt": f"picture {'x ' * number}".encode(), "json": b"{}"}
            if number < 5:
                members["json"] = b'{"punsafe": 0.25, "LANGUAGE": "en", "extra": 1}'
            writer.write(f"{number:03d}", members)
        more = {
            "020": {"png": encoded(picture(7)), "txt": b"a copy"},
            "021": {"jpg": encoded(picture(8), "JPEG", quality=80), "txt": b"alike"},
            "022": {"png": encoded(picture(100, (24, 20))), "txt": b"small"},
            "023": {"png": encoded(picture(101))[:-200], "txt": b"cut"},
            "024": {"png": encoded(picture(102)), "txt": b" "},
        }
        for key, members in more.items():
            writer.write(key, members)
    (tmp_path / "held").mkdir()
    with ShardWriter(tmp_path / "held", "heldout", 10) as writer:
        writer.write("000", {"png": encoded(picture(3).filter(ImageFilter.GaussianBlur(1))), "txt": b"blurred"})
        writer.write("001", {"png": encoded(picture(200)), "txt": b"its own"})
    return tmp_path


def words(captions):
    return [len(caption.split()) for caption in captions]


@pytest.mark.parametrize("processes", [0, 2])
def test_what_it_finds(shards, processes):
    stages = [Stage("base", 64, words, 10), Stage("sr", 128)]
    found = examine(
        str(shards / "train"), stages, held_out=str(shards / "held"), processes=processes, cache=shards / "cache"
    )
    contents = found.contents
    assert len(contents) == 23
    assert contents.reasons == {"truncated image": 1, "caption missing or empty": 1}
    assert sorted(skip.key for skip in contents.skips) == ["023", "024"]
    assert contents.sizes[0].tolist() == [96, 64]
    assert contents.short_sides.min() == 20
    base, sr = found.usable
    assert base.share == pytest.approx(22 / 23)
    assert sr.share == 0
    assert base.cut == pytest.approx(sum(n + 1 > 10 for n in range(20)) / 23)
    assert sr.tokens is None
    assert [[contents.keys[row] for row in group] for group in found.exact] == [["007", "020"]]
    assert [(contents.keys[i], contents.keys[j]) for i, j in found.near] == [("008", "021")]
    assert [(contents.keys[i], found.held_out.keys[j]) for i, j in found.leaks] == [("003", "000")]
    assert np.nanmax(contents.columns["punsafe"]) == 0.25
    assert (~np.isnan(contents.columns["punsafe"])).sum() == 5
    assert contents.columns["language"].tolist().count("en") == 5
    assert "extra" in contents.fields
    assert contents.name(0) == "000 in train-00000.tar"


def test_advice_names_what_was_found(shards):
    found = examine(str(shards / "train"), [Stage("sr", 128)], held_out=str(shards / "held"), cache=shards / "cache")
    advice = "\n".join(found.advice())
    assert "1 held-out images are in the training shards" in advice
    assert "2 of 25 samples cannot be used" in advice
    assert "100% of the images are smaller than sr needs (128 px)" in advice
    clean = examine(str(shards / "held"), cache=shards / "cache")
    assert clean.advice() == []
    assert len(clean.unchecked()) == 2
    said = summary(clean)
    assert (
        "Nothing to fix was found; not checked: whether held-out images are among these (--held-out), whether" in said
    )
    looked = replace(clean, held_out=clean.contents, usable=[Usable(Stage("base", 16), 1.0, np.ones(3), 0.0)])
    assert summary(looked).endswith("Nothing to fix was found.")
    assert "Nothing to fix" not in summary(found)


def test_alike_finds_every_pair_within_reach_and_no_other():
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**64, 300, dtype=np.uint64)
    for row in range(0, 300, 3):  # plant neighbours at 0 to 8 bits
        flips = generator.choice(64, row // 3 % 9, replace=False)
        hashes[row + 1] = hashes[row] ^ np.bitwise_or.reduce(
            np.array([np.uint64(1) << np.uint64(f) for f in flips], dtype=np.uint64), initial=np.uint64(0)
        )
    distance = np.array([[bin(int(a) ^ int(b)).count("1") for b in hashes] for a in hashes])
    expected = [(int(i), int(j)) for i, j in zip(*np.nonzero(np.triu(distance <= NEAR, 1)))]
    assert len(expected) >= 50
    assert alike(hashes) == expected
    across = alike(hashes[:100], hashes[100:])
    assert across == [(int(i), int(j)) for i, j in zip(*np.nonzero(distance[:100, 100:] <= NEAR))]


def test_shards_without_samples_are_refused(tmp_path):
    (tmp_path / "empty.tar").write_bytes(b"\0" * 1024)
    with pytest.raises(InputError, match="hold no sample"):
        examine(str(tmp_path / "empty.tar"), cache=tmp_path / "cache")
