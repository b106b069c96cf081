"""Folders and tables to shards and back to batches."""

import csv
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from imagen_lightning.cli import shards as cli
from imagen_lightning.data import ingest
from imagen_lightning.data.datamodule import LaionDataModule
from imagen_lightning.data.ingest import write_shards
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
    assert sorted(path.name for path in out.iterdir()) == [f"train-{number:05d}.tar" for number in range(3)]
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
    counts, skips = write_shards(source, out)
    assert counts == {"train": 5, "heldout": 0}
    assert listed(out) == {
        "00.png": "caption missing or empty",
        "02.png": "caption missing or empty",
        "04.png": "caption not UTF-8",
        "06.png": "undecodable image",
        "08.png": "truncated image",
    }
    assert skips.summary().startswith("5 samples skipped: 2 caption missing or empty, ")


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
    counts, _ = write_shards(write_table(tmp_path, kind, table), out)
    assert counts["train"] == 4
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
    counts, _ = write_shards(source, tmp_path / "a", held_out=0.25, shard_size=30)
    assert counts["train"] + counts["heldout"] == 200
    assert 25 < counts["heldout"] < 75

    def held(out):
        return {json.loads(sample["json"])["source"] for (split, _), sample in members(out) if split == "heldout"}

    for path in list(source.glob("0*.png")):
        path.unlink()
    write_shards(source, tmp_path / "b", held_out=0.25)
    names = {path.relative_to(source).as_posix() for path in source.rglob("*.png")}
    assert held(tmp_path / "b") == held(tmp_path / "a") & names


def test_an_out_that_holds_shards_is_refused_and_left(tmp_path):
    source, out = make_folder(tmp_path / "source"), tmp_path / "out"
    write_shards(source, out)
    before = (out / "train-00000.tar").read_bytes()
    with pytest.raises(InputError, match="holds shards already"):
        write_shards(source, out)
    assert (out / "train-00000.tar").read_bytes() == before


def test_an_interrupted_run_leaves_whole_shards_only(tmp_path, monkeypatch):
    source, out = make_folder(tmp_path / "source"), tmp_path / "out"
    decode, calls = ingest.decode_image, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return decode(*arguments)

    monkeypatch.setattr(ingest, "decode_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_shards(source, out, shard_size=4)
    assert [path.name for path in out.iterdir()] == ["train-00000.tar"]
    assert len(members(out)) == 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing", None, "does not exist"),
        ("notes.xml", b"<a/>", "is neither a folder nor a .csv"),
        ("a.csv", b"image,caption\n", "has no rows"),
        ("a.csv", b"picture,caption\na.png,x\n", "no image column"),
        ("a.csv", b"image,title\na.png,x\n", "no caption column.*give --caption-column"),
        ("a.csv", b"image,caption\nhttps://example.org/a.png,x\n", "holds addresses such as 'https.*img2dataset"),
        ("a.csv", b"image,caption\na.png,x\n", "gave no shard: 1 sample skipped: 1 image missing"),
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


def test_a_source_refused_halfway_leaves_no_part_of_it(tmp_path):
    (tmp_path / "0.png").write_bytes(picture(0))
    (tmp_path / "a.csv").write_text("image,caption\nnone.png,x\n0.png,x\n0.png,y\nhttps://example.org/a.png,x\n")
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds addresses"):
        write_shards(tmp_path / "a.csv", out, shard_size=1)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    source = make_folder(tmp_path / "source")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/out' cannot be read or written \(Not a directory\)"):
        write_shards(source, tmp_path / "file" / "out")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ingest.ShardWriter, "_finish", full)
    with pytest.raises(InputError, match=r"out' cannot be read or written \(No space left on device\)"):
        write_shards(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"pip install 'imagen-lightning\[parquet\]'"):
        write_shards(tmp_path / "a.parquet", tmp_path / "out")


@pytest.mark.parametrize(
    "options", [{"shard_size": 0}, {"max_side": 0}, {"held_out": 1.0}, {"held_out": -0.1}, {"quality": 0}]
)
def test_settings_refused(tmp_path, options):
    with pytest.raises(InputError):
        write_shards(make_folder(tmp_path / "source"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_command_line_asks_for_a_verb(capsys):
    with pytest.raises(InputError, match="VERB"):
        cli.main([])
    with pytest.raises(SystemExit) as stopped:
        cli.main(["write", "--help"])
    assert stopped.value.code == 0
    assert "--held-out" in capsys.readouterr().out
