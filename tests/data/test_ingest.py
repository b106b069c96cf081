"""Captioned images to shards and back to batches: options, counts, stops at any moment, and workers."""

import csv
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile

import numpy as np
import pytest
from given_data import given
from PIL import Image

from imagen_lightning.cli import shards as cli
from imagen_lightning.data import ingest
from imagen_lightning.data.datamodule import LaionDataModule
from imagen_lightning.data.ingest import lock, making, write_shards
from imagen_lightning.data.shards import index_shard
from imagen_lightning.types import InputError


def picture(number, size=(12, 10), format_="PNG", mode="RGB"):
    buffer = io.BytesIO()
    Image.new("RGB", size, (number * 3, 7, 9)).convert(mode).save(buffer, format_)
    return buffer.getvalue()


def make_folder(folder, num=10):
    (folder / "deep").mkdir(parents=True)
    for number in range(num):
        path = folder / ("deep" if number % 2 else "") / f"{number:02d}.png"
        path.write_bytes(picture(number))
        path.with_suffix(".txt").write_text(f"number {number}\n")
    return folder


def members(out):
    found = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                key, _, suffix = info.name.partition(".")
                found.setdefault((path.name.split("-")[0], key), {})[suffix] = tar.extractfile(info).read()
    return list(found.items())


def listed(out):
    lines = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    return {line["key"]: line["reason"] for line in lines}


def test_a_folder_becomes_shards_that_train(tmp_path, capsys):
    source, out = make_folder(tmp_path / "source"), tmp_path / "out"
    assert cli.main(["write", str(source), str(out), "--shard-size", "4"]) == 0
    assert sorted(path.name for path in out.glob("*.tar")) == [f"train-{number:05d}.tar" for number in range(3)]
    assert {path.suffix for path in out.iterdir()} == {".tar", ".json", ".index"}
    printed = capsys.readouterr().out
    assert "train: 10 samples in 3 shards" in printed
    assert "0 samples skipped" in printed
    for (_, _), sample in members(out):
        record = json.loads(sample["json"])
        assert sample["png"] == (source / record["source"]).read_bytes()  # stored as it is
        assert (record["width"], record["height"]) == (12, 10)
        assert sample["txt"].decode() == record["caption"]
    batch = next(iter(LaionDataModule(str(out), image_size=8, batch_size=10).train_dataloader()))
    numbers = [int(caption.removeprefix("number ")) for caption in batch.captions]
    assert sorted(numbers) == list(range(10))
    assert batch.images[:, 0, 0, 0].tolist() == [3 * number for number in numbers]


def test_skips_of_a_folder_are_counted_and_named(tmp_path):
    source, out = make_folder(tmp_path / "source"), tmp_path / "out"
    (source / "00.txt").unlink()
    (source / "02.txt").write_text(" \n")
    (source / "04.txt").write_bytes(b"caf\xe9")
    (source / "06.png").write_bytes(b"broken")
    (source / "08.png").write_bytes(picture(8, (300, 300))[:200])
    written = write_shards(source, out)
    assert (written.samples, written.shards) == ({"train": 5, "heldout": 0}, {"train": 1, "heldout": 0})
    assert listed(out) == {
        "00.png": "caption missing or empty",
        "02.png": "caption missing or empty",
        "04.png": "caption not UTF-8",
        "06.png": "undecodable image",
        "08.png": "truncated image",
    }
    assert str(written).startswith("5 samples skipped: 2 caption missing or empty, ")
    assert sum(written.skipped.values()) == 5


def rows(num=6):
    return [{"file_name": f"{n:02d}.png", "text": f"number {n}, with comma", "license": "CC0"} for n in range(num)]


def write_table(folder, kind, rows):
    path = folder / f"table.{kind}"
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_tables(tmp_path, kind):
    for number in range(6):
        (tmp_path / f"{number:02d}.png").write_bytes(picture(number))
    table = rows()
    table[2]["file_name"] = "missing.png"
    table[4]["text"] = ""
    out = tmp_path / "out"
    assert write_shards(write_table(tmp_path, kind, table), out).samples["train"] == 4
    assert listed(out) == {"row 3: missing.png": "image missing", "row 5: 04.png": "caption missing or empty"}
    for (_, key), sample in members(out):
        record = json.loads(sample["json"])
        number = int(key)
        assert sample["png"] == picture(number)
        assert record["caption"] == sample["txt"].decode() == f"number {number}, with comma"
        assert (record["source"], record["license"]) == (f"{number:02d}.png", "CC0")


def test_parquet_with_images_inside(tmp_path):
    table = [
        {"image": {"bytes": picture(n), "path": f"{n}.png"}, "caption": [f"number {n}", f"n={n}"]} for n in range(3)
    ]
    out = tmp_path / "out"
    write_shards(write_table(tmp_path, "parquet", table), out)
    found = members(out)
    assert [sample["png"] for _, sample in found] == [picture(number) for number in range(3)]
    assert found[1][1]["txt"] == b"number 1\nn=1"
    assert json.loads(found[1][1]["json"])["captions"] == ["number 1", "n=1"]


def test_jsonl_with_bad_lines_and_named_columns(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    lines = [b'{"img": "0.png", "alt": "zero"}', b"", b"{broken", b"[1]", b'{"img": "1.png", "alt": "caf\xe9"}']
    lines += [
        b'{"img": "1.png", "alt": 5}',
        b'{"img": "1\\u0000.png", "alt": "x"}',
        b'{"img": "1.png", "alt": "\\ud800"}',
    ]
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(lines))
    out = tmp_path / "out"
    assert cli.main(["write", f"{tmp_path}/t.jsonl", str(out), "--image-column=img", "--caption-column=alt"]) == 0
    assert [sample["txt"] for _, sample in members(out)] == [b"zero"]
    assert sorted(listed(out).values()) == sorted(
        ["bad JSON"] * 2 + ["caption not UTF-8"] * 2 + ["caption missing or empty", "image missing"]
    )
    with pytest.raises(
        InputError, match=r"no image column 'image' or .* its columns are 'img', 'alt': give --image-column"
    ):
        write_shards(tmp_path / "t.jsonl", tmp_path / "other")


def test_max_side_and_formats(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(source / "a.png")
    Image.fromarray(pixels).save(source / "b.jpg", quality=90)
    Image.fromarray(pixels).quantize(16).save(source / "c.gif")
    Image.fromarray(pixels[:10, :10]).save(source / "d.bmp")
    for name in "abcd":
        (source / f"{name}.txt").write_text(name)
    write_shards(source, out, max_side=20)
    found = {sample["txt"]: sample for _, sample in members(out)}
    suffixes = {b"a": "png", b"b": "jpg", b"c": "png", b"d": "png"}
    images = {name: Image.open(io.BytesIO(found[name][suffix])) for name, suffix in suffixes.items()}
    assert [images[name].size for name in suffixes] == [(20, 10)] * 3 + [(10, 10)]
    means = pixels.reshape(10, 4, 20, 4, 3).mean((1, 3))
    assert np.abs(np.asarray(images[b"a"], dtype=float) - means).max() <= 1
    assert np.array_equal(np.asarray(images[b"d"]), pixels[:10, :10])


def test_held_out_split_depends_on_the_name_alone(tmp_path):
    source = make_folder(tmp_path / "source", 200)
    counts = write_shards(source, tmp_path / "a", held_out=0.25, shard_size=30).samples
    assert counts["train"] + counts["heldout"] == 200
    assert 25 < counts["heldout"] < 75

    def held(out):
        return {json.loads(sample["json"])["source"] for (split, _), sample in members(out) if split == "heldout"}

    for path in list(source.glob("0*.png")):
        path.unlink()
    write_shards(source, tmp_path / "b", held_out=0.25)
    names = {path.relative_to(source).as_posix() for path in source.rglob("*.png")}
    assert held(tmp_path / "b") == held(tmp_path / "a") & names


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing", None, "does not exist"),
        ("notes.xml", b"<a/>", "is neither a folder nor a .csv"),
        ("a.csv", b"image,caption\n", "has no rows"),
        ("a.csv", b"picture,caption\na.png,x\n", "no image column"),
        ("a.csv", b"image,title\na.png,x\n", "no caption column.*give --caption-column"),
        ("a.csv", b"image,caption\nhttps://example.org/a.png,x\n", "holds addresses such as 'https.*img2dataset"),
        ("a.csv", b"image,caption\na.png,x\n", "gave no sample: 1 sample skipped: 1 image missing"),
        ("a.jsonl", b"nothing\n", "no line that is a JSON object"),
        ("a.parquet", b"PAR1 or not", "is no parquet file"),
    ],
)
def test_sources_refused(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        write_shards(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"pip install 'imagen-lightning\[parquet\]'"):
        write_shards(tmp_path / "a.parquet", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_size": 0}, "shard size 0 must be"),
        ({"max_side": 0}, "max side 0 must be"),
        ({"short_side": -1}, "short side -1 must be"),
        ({"short_side": 8, "max_side": 9}, "max side 9 and short side 8: give one"),
        ({"image_format": "gif"}, "format 'gif' is none of keep, jpg, png, webp"),
        ({"held_out": 1.0}, "held-out share 1.0 must be"),
        ({"held_out": -0.1}, "held-out share -0.1 must be"),
        ({"held_out_by": "artist"}, "held-out by 'artist' needs a held-out share"),
        ({"held_out_by": "artist", "held_out": 0.1}, "no field 'artist': split by 'folder' or 'caption'"),
        ({"quality": 0}, "quality 0 must be"),
        ({"workers": -1}, "-1 workers"),
        ({"filter": "min_side"}, "has no '='"),
        ({"filter": "beauty_min=3"}, "beauty_min"),
    ],
)
def test_settings_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        write_shards(make_folder(tmp_path / "source"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_command_line_asks_for_a_verb(capsys):
    with pytest.raises(InputError, match="VERB"):
        cli.main([])
    with pytest.raises(SystemExit) as stopped:
        cli.main(["write", "--help"])
    assert stopped.value.code == 0
    assert "--held-out" in capsys.readouterr().out


# ---- options


def images(out):
    """First caption to (format, image, json) of each stored sample."""
    found = {}
    for _, sample in members(out):
        record = json.loads(sample["json"])
        suffix = next(name for name in sample if name not in ("txt", "json"))
        found[record["caption"]] = suffix, Image.open(io.BytesIO(sample[suffix])), record
    return found


def make_formats(folder, size=(40, 80)):
    """One image in five formats, with captions a to e."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for name, suffix in zip("abcde", ("png", "jpg", "webp", "gif", "bmp")):
        Image.fromarray(pixels).save(folder / f"{name}.{suffix}", **({"quality": 90} if suffix == "jpg" else {}))
        (folder / f"{name}.txt").write_text(name)
    return folder, pixels


def test_short_side_reduces_and_never_enlarges(tmp_path):
    source, pixels = make_formats(tmp_path / "source")
    write_shards(source, tmp_path / "out", short_side=10)
    found = images(tmp_path / "out")
    assert [found[name][1].size for name in "abcde"] == [(20, 10)] * 5
    assert [found[name][0] for name in "abcde"] == ["png", "jpg", "webp", "png", "png"]
    means = pixels.reshape(10, 4, 20, 4, 3).mean((1, 3))
    assert np.abs(np.asarray(found["a"][1], dtype=float) - means).max() <= 1
    _, _, record = found["a"]
    sizes = [record[name] for name in ("width", "height", "original_width", "original_height")]
    assert sizes == [20, 10, 80, 40]
    write_shards(source, tmp_path / "same", short_side=41)
    for _, sample in members(tmp_path / "same"):
        record = json.loads(sample["json"])
        assert (record["width"], record["height"], "original_width" in record) == (80, 40, False)


@pytest.mark.parametrize("wanted", ["jpg", "png", "webp"])
def test_formats(tmp_path, wanted):
    source, pixels = make_formats(tmp_path / "source")
    write_shards(source, tmp_path / "out", image_format=wanted)
    found = images(tmp_path / "out")
    names = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
    assert {(suffix, image.format) for suffix, image, _ in found.values()} == {(wanted, names[wanted])}
    same = {"jpg": "b.jpg", "png": "a.png", "webp": "c.webp"}[wanted]  # stored as it is
    stored = next(sample for _, sample in members(tmp_path / "out") if json.loads(sample["json"])["source"] == same)
    assert stored[wanted] == (source / same).read_bytes()
    if wanted == "png":
        assert np.array_equal(np.asarray(found["e"][1]), pixels)


def test_quality_of_what_is_encoded_anew(tmp_path):
    source, _ = make_formats(tmp_path / "source")
    sizes = {}
    for quality in (20, 95):
        out = tmp_path / str(quality)
        write_shards(source, out, image_format="jpg", quality=quality)
        for _, sample in members(out):
            sizes[quality, json.loads(sample["json"])["source"]] = len(sample["jpg"])
    assert sizes[20, "a.png"] < 0.6 * sizes[95, "a.png"]
    assert sizes[20, "b.jpg"] == sizes[95, "b.jpg"]


def test_filter_sees_metadata_and_the_size_before_reduction(tmp_path):
    table = []
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(picture(number, (30, 20 + number)))
        language = "de" if number == 3 else "" if number == 4 else "en"
        table.append({"file_name": f"{number}.png", "text": f"number {number}", "LANGUAGE": language, "WIDTH": 7})
    (tmp_path / "5.png").write_bytes(b"broken")
    out = tmp_path / "out"
    written = write_shards(write_table(tmp_path, "csv", table), out, filter="min_side=24,language=en", max_side=8)
    assert written.samples["train"] == 6
    assert written.filtered == {"min_side=24": 4, "language missing": 1}
    assert written.skipped == {"undecodable image": 1}
    assert listed(out) == {
        **{f"row {n + 1}: {n}.png": "filter: min_side=24" for n in range(4)},
        "row 5: 4.png": "filter: language missing",
        "row 6: 5.png": "undecodable image",
    }
    assert str(written) == (
        "1 sample skipped: 1 undecodable image; "
        "filter: 6 of 11 samples left; removed: 4 min_side=24, 1 language missing"
    )


def test_several_captions_train(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1))
    table = [{"image": "a.png", "short": "a cat", "long": ["a cat on  a mat", "the cat"], "note": float("nan")}]
    (tmp_path / "t.jsonl").write_text(json.dumps(table[0]))
    out = tmp_path / "out"
    arguments = ["--caption-column", "short", "--caption-column", "long", "--workers", "0"]
    assert cli.main(["write", str(tmp_path / "t.jsonl"), str(out), *arguments]) == 0
    ((_, sample),) = members(out)
    assert sample["txt"] == b"a cat\na cat on a mat\nthe cat"
    record = json.loads(sample["json"], parse_constant=lambda name: pytest.fail(name))
    assert record["captions"] == ["a cat", "a cat on a mat", "the cat"]
    assert record["note"] is None
    data = LaionDataModule(str(out), image_size=8, batch_size=32)
    batch = next(iter(data.train_dataloader()))
    assert set(batch.captions) == set(record["captions"])


def test_held_out_by_a_field(tmp_path):
    table = []
    for number in range(90):
        (tmp_path / f"{number}.png").write_bytes(picture(number % 80))
        artist = None if number % 3 == 2 else f"artist {number % 20}"
        table.append({"image": f"{number}.png", "text": f"number {number}", "artist": artist})
    sides = []
    for kind in ("jsonl", "csv"):
        out = tmp_path / kind
        source = write_table(tmp_path, kind, table)
        written = write_shards(source, out, held_out=0.4, held_out_by="artist", shard_size=20)
        assert all(written.samples.values())
        side = {"": set()}
        for (split, _), sample in members(out):
            record = json.loads(sample["json"])
            side.setdefault(record["artist"] or "", set()).add(split)
        assert {len(splits) for artist, splits in side.items() if artist} == {1}
        assert set.union(*(splits for artist, splits in side.items() if artist)) == {"train", "heldout"}
        assert side[""] == {"train", "heldout"}  # those without an artist go by their names
        sides.append(side)
    assert sides[0] == sides[1]


def test_an_image_named_twice_is_two_samples_of_one_side(tmp_path):
    table = []
    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
        table += [{"image": f"{number}.png", "text": f"{again} {number}"} for again in ("first", "second")]
    out = tmp_path / "out"
    assert write_shards(write_table(tmp_path, "csv", table), out, held_out=0.5).samples.keys() == {"train", "heldout"}
    sides, keys = {}, []
    for (split, key), sample in members(out):
        keys.append(key)
        sides.setdefault(json.loads(sample["json"])["source"], []).append(split)
    assert len(set(keys)) == 80
    assert set(map(tuple, sides.values())) == {("train", "train"), ("heldout", "heldout")}


def test_all_held_out_is_said(tmp_path, capsys):
    source = make_folder(tmp_path / "source", 3)
    for path in source.rglob("*.txt"):
        path.write_text("one caption for all, hashed below a half")
    arguments = ["--held-out", "0.99", "--held-out-by", "caption", "--workers", "0"]
    assert cli.main(["write", str(source), str(tmp_path / "out"), *arguments]) == 0
    assert "all samples are held out" in capsys.readouterr().out


def test_real_photos_of_a_zip_train(tmp_path):
    shard = given("coco-mini-permissive", "train-00000.tar")
    lines, captions = [], {}
    with tarfile.open(shard) as tar, zipfile.ZipFile(tmp_path / "coco.zip", "w") as archive:
        for info in tar:
            if info.name.endswith(".webp"):
                archive.writestr(f"photos/{info.name}", tar.extractfile(info).read())
                record = json.load(tar.extractfile(info.name.replace(".webp", ".json")))
                captions[f"photos/{info.name}"] = [" ".join(text.split()) for text in record["captions"]]
                fields = {"captions": record["captions"], "license": record["license"]}
                lines.append(json.dumps({"file_name": info.name, **fields}))
        archive.writestr("photos/metadata.jsonl", "\n".join(lines))
    out = tmp_path / "out"
    arguments = ["--short-side", "64", "--format", "jpg", "--filter", "min_side=160", "--held-out", "0.2"]
    assert cli.main(["write", str(tmp_path / "coco.zip"), str(out), *arguments, "--workers", "0"]) == 0
    found = {}
    for _, sample in members(out):
        record = json.loads(sample["json"])
        assert record["captions"] == captions[record["source"]]
        assert min(record["width"], record["height"]) == 64
        found[record["source"]] = record["captions"]
    assert len(found) > 40
    data = LaionDataModule(str(out / "train-*.tar"), str(out / "heldout-*.tar"), image_size=64, batch_size=16)
    batch = next(iter(data.train_dataloader()))
    assert batch.images.shape == (16, 3, 64, 64)
    assert set(batch.captions) <= {caption for texts in found.values() for caption in texts}


# ---- stopped and gone on with


def tree(out):
    """Every file's bytes; an index holds its shard's time of change, and is compared as an index."""
    files = {path.relative_to(out).as_posix(): path for path in sorted(out.rglob("*")) if path.is_file()}
    assert {name + ".index" for name in files if name.endswith(".tar")} <= set(files)
    return {name: path.read_bytes() for name, path in files.items() if not name.endswith(".index")}


def check_parts(out, whole):
    """What lies there is a part of the whole, or unfinished."""
    for name, data in tree(out).items() if out.exists() else ():
        if not name.endswith(".partial") and not name.startswith(("unfinished/", "plan.json")):
            assert data == whole[name], name


def make_mixed(folder, num=23):
    """A CSV of good and bad rows."""
    folder.mkdir()
    table = []
    for number in range(num):
        (folder / f"{number}.png").write_bytes(b"broken" if number % 7 == 3 else picture(number, (12 + number, 10)))
        table.append({"image": f"{number}.png", "text": "" if number % 11 == 5 else f"number {number}"})
    return write_table(folder, "csv", table)


OPTIONS = {"shard_size": 4, "held_out": 0.3, "filter": "width_max=32", "max_side": 16, "progress": False}


def run_killed(source, out, call, before):
    """Runs in a child that is killed before, or after, its `call`th file gets its name; says if there was one."""
    child = os.fork()
    if not child:
        replace, calls = os.replace, []

        def killed(*arguments):
            calls.append(1)
            if len(calls) == call and before:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*arguments)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = killed
        try:
            write_shards(source, out, **OPTIONS)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("before", [True, False])
def test_killed_at_every_file_once(tmp_path, before):
    source = make_mixed(tmp_path / "source")
    write_shards(source, tmp_path / "whole", **OPTIONS)
    whole = tree(tmp_path / "whole")
    assert len([name for name in whole if name.endswith(".tar")]) >= 5
    call = 0
    while True:
        call += 1
        out = tmp_path / f"out{call}"
        killed = run_killed(source, out, call, before)
        if not killed:
            break
        check_parts(out, whole)
        write_shards(source, out, **OPTIONS)
        assert tree(out) == whole
    assert tree(out) == whole
    assert call > 15  # plan twice, skipped.jsonl, and note, index and tar of each shard


def test_killed_again_and_again(tmp_path):
    """Each run is killed at its third file: the runs go on until nothing is left to do."""
    source = make_mixed(tmp_path / "source")
    write_shards(source, tmp_path / "whole", **OPTIONS)
    runs = 0
    while run_killed(source, tmp_path / "out", 4, before=False):
        runs += 1
        check_parts(tmp_path / "out", tree(tmp_path / "whole"))
    assert runs >= 4
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    keys = [json.loads(line)["key"] for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert len(keys) == len(set(keys)) > 5


def test_a_finished_folder_is_left(tmp_path, capsys):
    source, out = make_mixed(tmp_path / "source"), tmp_path / "out"
    first = write_shards(source, out, **OPTIONS)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = write_shards(source, out, **OPTIONS)
    assert again.num_made == 0 < first.num_made
    assert (again.samples, again.shards, str(again)) == (first.samples, first.shards, str(first))
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    arguments = [str(source), str(tmp_path / "other"), "--workers", "0"]
    cli.main(["write", *arguments])
    capsys.readouterr()
    assert cli.main(["write", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "other' is finished already: nothing to do" in printed
    assert "train: 18 samples in 1 shard" in printed


def test_a_shard_deleted_later_is_made_again(tmp_path):
    source, out = make_mixed(tmp_path / "source"), tmp_path / "out"
    write_shards(source, out, **OPTIONS)
    before = tree(out)
    (out / "train-00002.tar").unlink()
    assert write_shards(source, out, **OPTIONS).num_made == 1
    assert tree(out) == before


@pytest.mark.parametrize("finished", [True, False])
def test_another_command_over_the_same_folder_is_refused(tmp_path, finished):
    source, out = make_mixed(tmp_path / "source"), tmp_path / "out"
    if finished:
        write_shards(source, out, **OPTIONS)
    else:
        assert run_killed(source, out, 5, before=False)
    before = tree(out)
    for options, message in (
        ({"max_side": 17}, "was begun with --max-side 16, not 17; give that again, or another folder"),
        ({"max_side": None, "short_side": 16}, "--max-side 16, not None"),
        ({"filter": None}, "--filter 'width_max=32', not None"),
        ({"shard_size": 5}, "--shard-size 4, not 5"),
        ({"held_out": 0.2}, "--held-out 0.3, not 0.2"),
        ({"held_out_by": "text"}, "--held-out-by None, not 'text'"),
        ({"image_format": "png"}, "--format 'keep', not 'png'"),
        ({"caption_column": "text"}, "--caption-column"),
    ):
        with pytest.raises(InputError, match=message):
            write_shards(source, out, **{**OPTIONS, **options})
    other = make_mixed(tmp_path / "other")
    with pytest.raises(InputError, match=r"was begun with the source '.*source/table.csv', not '.*other/table.csv'"):
        write_shards(other, out, **OPTIONS)
    source.write_text(source.read_text().replace("number 4", "number four"))
    with pytest.raises(InputError, match=r"has changed since .* was begun \(23 records then, 23 now"):
        write_shards(source, out, **OPTIONS)
    assert tree(out) == before


def test_the_same_source_by_another_way_goes_on(tmp_path, monkeypatch):
    source, out = make_mixed(tmp_path / "source"), tmp_path / "out"
    assert run_killed(source, out, 6, before=False)
    monkeypatch.chdir(source.parent)
    assert write_shards(type(source)("table.csv"), out, **{**OPTIONS, "filter": " width_max=32.0"}).num_made > 0


def test_folders_of_others_are_refused(tmp_path):
    source = make_folder(tmp_path / "source")
    for name, content, message in (
        ("train-00007.tar", b"mine", "holds shards already, without a plan"),
        ("skipped.jsonl", b"mine", "holds a skipped.jsonl already"),
        ("plan.json", b"{broken", "is no plan of shards"),
        ("plan.json", b'{"options": {}, "format_version": 2}', "plan of format 2, not 1"),
    ):
        out = tmp_path / f"{len(message)}"
        out.mkdir()
        (out / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            write_shards(source, out)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == {name: content}
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file' is a file; give a folder"):
        write_shards(source, tmp_path / "file")
    with pytest.raises(InputError, match=r"file/out' cannot be read or written \(Not a directory\); mend that first$"):
        write_shards(source, tmp_path / "file" / "out")


def test_files_of_others_beside_the_shards_are_left(tmp_path):
    source, out = make_folder(tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    (out / "mine.partial").write_text("mine")
    (out / "train-00000.tar.partial").write_text("of a run that was killed")
    (out / ".train-00000.tar.index.0123abcd.partial").write_text("likewise")
    write_shards(source, out)
    assert {path.name for path in out.glob("*.partial")} == {"mine.partial"}


def test_an_interrupted_run_leaves_whole_shards(tmp_path, monkeypatch):
    source, out = make_folder(tmp_path / "source"), tmp_path / "out"
    make, calls = making.make_sample, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return make(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(making, "make_sample", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_shards(source, out, shard_size=4)
    assert [path.name for path in out.glob("*.tar*")] == ["train-00000.tar", "train-00000.tar.index"]
    assert len(members(out)) == 4
    assert write_shards(source, out, shard_size=4).num_made == 2


def test_a_full_disk_leaves_whole_shards_and_says_how_to_go_on(tmp_path, monkeypatch):
    source, out = make_mixed(tmp_path / "source"), tmp_path / "out"
    finish, calls = making.ShardWriter._finish, []

    def full(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        finish(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(making.ShardWriter, "_finish", full)
        with pytest.raises(
            InputError, match=r"out' cannot be read or written \(No space left on device\); mend that"
        ) as stop:
            write_shards(source, out, **OPTIONS)
    assert str(stop.value).endswith("the same command goes on with the others")
    assert len(list(out.glob("*.tar"))) == 2
    assert not list(out.glob("*.partial"))
    write_shards(source, out, **OPTIONS)
    write_shards(source, tmp_path / "whole", **OPTIONS)
    assert tree(out) == tree(tmp_path / "whole")


def test_a_source_that_goes_away_is_no_matter_of_the_images(tmp_path, monkeypatch):
    source, out = make_folder(tmp_path / "source"), tmp_path / "out"
    make = making.make_sample

    def move_away(*arguments):
        if source.exists():
            source.rename(tmp_path / "away")
        return make(*arguments)

    monkeypatch.setattr(making, "make_sample", move_away)
    with pytest.raises(InputError, match=r"source' went away; the shards that are there are whole"):
        write_shards(source, out, shard_size=4)
    assert not list(out.glob("*.tar"))
    (tmp_path / "away").rename(source)
    monkeypatch.undo()
    assert write_shards(source, out, shard_size=4).samples["train"] == 10


def test_a_damaged_table_stops_where_it_is_damaged(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = [{"image": picture(n), "caption": f"number {n}"} for n in range(20)]
    path, out = tmp_path / "t.parquet", tmp_path / "out"
    parquet.write_table(pyarrow.Table.from_pylist(table), path, row_group_size=5, compression="zstd")
    data = bytearray(path.read_bytes())
    offset = parquet.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    path.write_bytes(data[:offset] + bytes(200) + data[offset + 200 :])
    with pytest.raises(InputError, match=r"is damaged near row 11: .*; the shards that are there are whole"):
        write_shards(path, out, shard_size=5)
    assert len(list(out.glob("*.tar"))) == 2


def test_two_at_once_are_refused(tmp_path, monkeypatch):
    source, out = make_folder(tmp_path / "source"), tmp_path / "out"
    monkeypatch.setattr(lock, "_LOCK_WAIT", 0.1)
    out.mkdir()
    with lock.locked(out), pytest.raises(InputError, match="another `shards write` is at work"):
        write_shards(source, out)
    assert not list(out.iterdir())
    write_shards(source, out)


def test_nothing_usable_leaves_nothing(tmp_path):
    source, out = make_folder(tmp_path / "source", 3), tmp_path / "out"
    with pytest.raises(InputError, match=r"gave no sample: .*; filter: 0 of 3 .* removed: 3 min_side=99"):
        write_shards(source, out, filter="min_side=99")
    assert not out.exists()
    out.mkdir()
    with pytest.raises(InputError, match="gave no sample"):
        write_shards(source, out, filter="min_side=99")
    assert not list(out.iterdir())


def test_a_shard_of_skips_alone_is_a_note_alone(tmp_path):
    source, out = make_folder(tmp_path / "source"), tmp_path / "out"
    for number in range(4, 8, 2):
        (source / f"0{number}.png").write_bytes(b"broken")
    written = write_shards(source, out, shard_size=2)  # 00, 02, 04, … first
    assert written.shards["train"] == 4
    assert sorted(path.name for path in out.glob("*.tar")) == [f"train-0000{n}.tar" for n in (0, 2, 3, 4)]
    assert write_shards(source, out, shard_size=2).num_made == 0
    data = LaionDataModule(str(out), image_size=8, batch_size=4)
    assert len(next(iter(data.train_dataloader())).keys) == 4


# ---- processes


def test_workers_write_the_same_bytes(tmp_path, capfd):
    source = make_mixed(tmp_path / "source", 60)
    trees = {}
    for workers in (0, 1, 2):
        out = tmp_path / str(workers)
        written = write_shards(source, out, **OPTIONS, workers=workers)
        assert written.num_made >= 15
        trees[workers] = tree(out)
    assert trees[1] == trees[0]
    assert trees[2] == trees[0]
    assert not any(index_shard(path).skips for path in (tmp_path / "2").glob("*.tar"))
    assert not multiprocessing.active_children()


def test_workers_by_default(tmp_path, monkeypatch):
    source = make_many(tmp_path / "source", 40)
    used = []
    monkeypatch.setattr(ingest.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(ingest, "make_shards", lambda job, tasks, workers, *_: used.append(workers))
    for per_worker, size in ((500, 10), (10, 10), (20, 10), (10, 20), (10, 40)):
        monkeypatch.setattr(ingest, "_WORTH_A_WORKER", per_worker)
        with pytest.raises(InputError):  # nothing was made
            write_shards(source, tmp_path / f"{per_worker} {size}", shard_size=size, workers=None)
    assert used == [0, 4, 2, 2, 0]


def test_workers_that_fail_or_are_killed(tmp_path):
    source, out = make_mixed(tmp_path / "source", 60), tmp_path / "out"

    def kill_one():
        while not multiprocessing.active_children():
            time.sleep(0.01)
        multiprocessing.active_children()[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(InputError, match=r"a worker was ended by SIGKILL at .*-0000\d; .*the same command"):
        write_shards(source, out, **OPTIONS, workers=2)
    killer.join()
    assert not multiprocessing.active_children()

    blocked = next(
        out / f"train-{number:05d}.tar" for number in range(9) if not (out / f"train-{number:05d}.tar").exists()
    )
    (blocked / "x").mkdir(parents=True)  # in the way of a worker
    with pytest.raises(InputError, match="cannot be read or written"):
        write_shards(source, out, **OPTIONS, workers=2)
    (blocked / "x").rmdir()
    blocked.rmdir()
    write_shards(source, out, **OPTIONS, workers=2)
    write_shards(source, tmp_path / "whole", **OPTIONS)
    assert tree(out) == tree(tmp_path / "whole")


def run_to_a_chance(command, out, rng):
    """Runs a command and kills it at a random moment, mostly soon after a shard; returns its exit code."""
    there = len(list(out.glob("*.tar")))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if rng.random() < 0.3:
        time.sleep(rng.uniform(0, 4))
    else:
        while process.poll() is None and len(list(out.glob("*.tar"))) == there:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
    process.kill()
    _, errors = process.communicate()
    assert b"Traceback" not in errors
    return process.returncode


def make_many(folder, num):
    """Many names for few images."""
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.jpg").write_bytes(picture(number, (200, 120), "JPEG"))
        (folder / f"{number}.txt").write_text(f"number {number}")
    (folder / "3.jpg").write_bytes(b"broken")
    for number in range(8, num):
        for suffix in ("jpg", "txt"):
            os.link(folder / f"{number % 8}.{suffix}", folder / f"{number}.{suffix}")
    return folder


@pytest.mark.parametrize("kills", [1, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, kills):
    """The command with its workers is killed again and again; whenever it comes to its end, it starts anew."""
    num = 160 if kills == 1 else 1000
    source, rng = make_many(tmp_path / "source", num), random.Random(0)
    write_shards(source, tmp_path / "whole", shard_size=num // 40, held_out=0.3, max_side=16)
    whole = tree(tmp_path / "whole")
    command = [sys.executable, "-m", "imagen_lightning", "shards", "write", str(source), "--workers", "2"]
    command += ["--shard-size", str(num // 40), "--held-out", "0.3", "--max-side", "16"]
    number, killed, code = 0, 0, None
    while killed < kills or code != 0:
        out = tmp_path / f"out{number}"
        if killed < kills:
            code = run_to_a_chance([*command, str(out)], out, rng)
            killed += code == -signal.SIGKILL
            check_parts(out, whole)
        else:
            code = subprocess.run([*command, str(out)], stdout=subprocess.DEVNULL, check=False).returncode
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            assert tree(out) == whole
            number += 1


@pytest.mark.parametrize(
    ("sent", "code", "workers"), [(signal.SIGINT, 130, 0), (signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 2)]
)
def test_signals_end_it_cleanly(tmp_path, sent, code, workers):
    source, out = make_many(tmp_path / "source", 600), tmp_path / "out"
    command = [sys.executable, "-m", "imagen_lightning", "shards", "write", str(source), str(out)]
    command += ["--workers", str(workers), "--shard-size", "10", "--max-side", "16"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes, start_new_session=True)
    while process.poll() is None and not list(out.glob("*.tar")):
        time.sleep(0.005)
    os.killpg(process.pid, sent)  # as a terminal does, and a batch system
    printed, errors = process.communicate(timeout=60)
    assert (process.returncode, printed) == (code, "")
    assert errors == (
        "imagen-lightning: stopped; the shards that are there are whole, and the same command goes on with the others\n"
    )
    assert not list(out.rglob("*.partial"))
    assert (out / "plan.json").exists()
    there = len(list(out.glob("*.tar")))
    assert 0 < there < 60
    written = write_shards(source, out, shard_size=10, max_side=16)
    assert written.num_made == 60 - there
    assert written.skipped == {"undecodable image": 75}
