"""Sources of captioned images: what they list, and what they read, from sound and from odd input."""

import copy
import csv
import io
import json
import os
import zipfile

import pytest
from PIL import Image

from imagen_lightning.data.ingest import containers, files
from imagen_lightning.data.ingest.record import Fault
from imagen_lightning.data.ingest.samples import ImageSettings, make_sample
from imagen_lightning.data.ingest.sources import open_source
from imagen_lightning.types import InputError


def picture(number, size=(12, 10)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (number * 3, 7, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def records(source):
    """The source's records, read from the last to the first by a copy, as it is handed to a worker."""
    entries = list(source.entries())
    handed = copy.deepcopy(source)
    read = [handed.read(entry.place) for entry in reversed(entries)][::-1]
    assert [record.name for record in read] == [entry.name or record.name for entry, record in zip(entries, read)]
    handed.close()
    assert handed.read(entries[0].place) == read[0]
    return read


def said(source):
    """Key to caption, or to what is wrong."""
    found = {}
    for record in records(source):
        try:
            found[record.key] = make_sample(record, ImageSettings())["txt"]
        except Fault as fault:  # noqa: PERF203
            found[record.key] = fault.reason
    return found


def groups(source, field):
    return [entry.group for entry in source.entries(field)]


# ---- folders and zips


def write_files(where, contents):
    """Files by name into a folder, or into a .zip."""
    if where.suffix == ".zip":
        with zipfile.ZipFile(where, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in contents.items():
                archive.writestr(name, data)
    else:
        for name, data in contents.items():
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            (where / name).write_bytes(data)
    return where


@pytest.mark.parametrize("kind", ["source", "source.zip"])
def test_images_with_txt(tmp_path, kind):
    contents = {
        "a.png": picture(1),
        "a.txt": b"\xef\xbb\xbfone\r\ntwo\n",
        "deep/b.PNG": picture(2),
        "deep/b.txt": "zwei ü".encode(),
        "deep/c.png": picture(3),
        "notes.md": b"no image",
        "._a.png": b"a resource fork",
        "__MACOSX/a.png": b"another",
    }
    source = open_source(write_files(tmp_path / kind, contents))
    found = records(source)
    assert [(record.name, record.captions) for record in found] == [
        ("a.png", contents["a.txt"]),
        ("deep/b.PNG", contents["deep/b.txt"]),
        ("deep/c.png", None),
    ]
    assert [record.image for record in found] == [picture(1), picture(2), picture(3)]
    assert groups(source, "folder") == ["", "deep", "deep"]
    assert groups(source, "caption") == ["\ufeffone\r\ntwo", "zwei ü", None]
    with pytest.raises(InputError, match="no field 'artist': split by 'folder' or 'caption'"):
        groups(source, "artist")


@pytest.mark.parametrize("kind", ["source", "source.zip"])
def test_the_stamp_tells_another_file_of_the_same_name(tmp_path, kind):
    one, two = tmp_path / "1", tmp_path / "2"
    one.mkdir()
    two.mkdir()
    contents = {"a.png": picture(1), "a.txt": b"one", "b.png": picture(2)}
    first = open_source(write_files(one / kind, contents))
    second = open_source(write_files(two / kind, {**contents, "a.txt": b"another"}))
    assert [a == b for a, b in zip(first.entries(), second.entries())] == [False, True]


@pytest.mark.parametrize("kind", ["source", "source.zip"])
def test_large_files_are_not_read(tmp_path, kind, monkeypatch):
    contents = {"a.png": picture(1), "a.txt": b"x", "b.png": bytes(5000), "b.txt": b"y", "c.png": picture(3)}
    contents["c.txt"] = b"z" * 300
    monkeypatch.setattr(containers, "MAX_IMAGE_BYTES", 4999)
    monkeypatch.setattr(files, "MAX_CAPTION_BYTES", 299)
    source = open_source(write_files(tmp_path / kind, contents))
    over = "file over the size limit"
    assert said(source) == {"a.png": b"x", "b.png": over, "c.png": over}
    assert groups(source, "caption") == ["x", "y", None]


def test_links_and_other_things_of_a_folder(tmp_path):
    source = write_files(tmp_path / "source", {"a.png": picture(1), "a.txt": b"x"})
    (source / "gone.png").symlink_to("nowhere")
    (source / "b.png").symlink_to("a.png")
    (source / "folder.png").mkdir()
    os.mkfifo(source / "pipe.png")
    (source / "again").symlink_to(source)
    found = [(record.name, record.fault) for record in records(open_source(source))]
    unsafe = "unsafe member name or type"
    assert found == [("a.png", None), ("b.png", None), ("gone.png", "image missing"), ("pipe.png", unsafe)]


def test_an_image_that_vanishes(tmp_path):
    source = write_files(tmp_path / "source", {"a.png": picture(1), "b.png": picture(2)})
    opened = open_source(source)
    places = [entry.place for entry in opened.entries()]
    (source / "a.png").unlink()
    assert [opened.read(place).fault for place in places] == ["image missing", None]


def test_zip_members_that_lead_out_or_come_twice(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("../up.png", "/root.png", "x/../../y.png", "..\\up.png", "twice.png", "2wice.png", "ok.png"):
            archive.writestr(name, picture(len(archive.infolist())))
        archive.writestr("twice.txt", "twice")
        archive.writestr("ok.txt", "fine")
    path.write_bytes(path.read_bytes().replace(b"2wice.png", b"twice.png"))
    found = [(r.name, r.fault) for r in records(open_source(path))]
    unsafe = "unsafe member name or type"
    assert found == [
        *((name, unsafe) for name in ("../up.png", "/root.png", "x/../../y.png", "..\\up.png")),
        ("twice.png", None),
        ("twice.png", "duplicate key"),
        ("ok.png", None),
    ]
    kept = [r.image for r in records(open_source(path)) if r.fault is None]
    assert kept == [picture(4), picture(6)]


def test_zip_bombs_and_damage(tmp_path, monkeypatch):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("bomb", "liar", "bad", "locked", "ok"):
            archive.writestr(f"{name}.png", bytes(2**24) if name in ("bomb", "liar") else picture(1, (64, 64)))
            archive.writestr(f"{name}.txt", name)
        archive.writestr("bz.png", picture(1), zipfile.ZIP_BZIP2)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        bad = archive.getinfo("bad.png")
        data[bad.header_offset + 30 + len("bad.png") + 60] ^= 0xFF

    def central(name):
        return data.rindex(name.encode()) - 46  # the entry of the directory, at the end of the file

    data[central("liar.png") + 24 : central("liar.png") + 28] = (100).to_bytes(4, "little")  # 16 MiB that say 100
    data[central("locked.png") + 8] |= 1
    path.write_bytes(data)
    monkeypatch.setattr(containers, "MAX_IMAGE_BYTES", 2**20)

    largest = []
    read = zipfile.ZipExtFile._read1
    monkeypatch.setattr(zipfile.ZipExtFile, "_read1", lambda *a: largest.append(read(*a)) or largest[-1])
    found = {record.name: record.fault for record in records(open_source(path))}
    assert found == {
        "bomb.png": "file over the size limit",
        "liar.png": "undecodable image",
        "bad.png": "undecodable image",
        "locked.png": "undecodable image",
        "ok.png": None,
        "bz.png": containers.OTHER_COMPRESSION,
    }
    assert max(map(len, largest)) < 2**20


def test_zips_that_are_none(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK or not")
    with pytest.raises(InputError, match="is no zip file"):
        open_source(tmp_path / "a.zip")
    write_files(tmp_path / "b.zip", {"a.png": picture(1)})
    (tmp_path / "b.zip").write_bytes((tmp_path / "b.zip").read_bytes()[:-30])
    with pytest.raises(InputError, match="is no zip file"):
        open_source(tmp_path / "b.zip")
    write_files(tmp_path / "c.zip", {"a.md": b""})
    with pytest.raises(InputError, match="holds no image"):
        open_source(tmp_path / "c.zip")


# ---- tables


def table_bytes(kind, rows):
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        buffer = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, row_group_size=3)
        return buffer.getvalue()
    if kind == "jsonl":
        return "\n".join(json.dumps(row) for row in rows).encode()
    if kind == "tsv":  # as published ones are: nothing is quoted
        return "\n".join("\t".join(cells) for cells in [rows[0], *(row.values() for row in rows)]).encode()
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def rows(num=8):
    return [{"file_name": f"{n}.png", "text": f'no. {n}, "so"\nto say', "artist": f"a{n % 2}"} for n in range(num)]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_beside_images(tmp_path, kind):
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    table = [{**row, "text": row["text"].replace("\n", " ")} if kind == "tsv" else row for row in rows()]
    (tmp_path / f"t.{kind}").write_bytes(table_bytes(kind, table))
    source = open_source(tmp_path / f"t.{kind}")
    found = records(source)
    assert [record.image for record in found] == [picture(number) for number in range(8)]
    assert [record.captions for record in found] == [[row["text"]] for row in table]
    assert [record.metadata for record in found] == [{"artist": row["artist"]} for row in table]
    assert found[3].key == "row 4: 3.png"
    assert groups(source, "artist") == ["a0", "a1"] * 4
    with pytest.raises(InputError, match="no field 'painter' to split by; its columns are 'file_name', "):
        groups(source, "painter")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("where", ["source", "source.zip"])
def test_image_folders(tmp_path, kind, where):
    contents = {f"{folder}/{n}.png": picture(n) for n in range(3) for folder in ("train", "test/deep")}
    for folder in ("train/", "test/"):
        table = [
            {"file_name": f"{'deep/' if folder == 'test/' else ''}{n}.png", "text": f"{folder}{n}"} for n in (2, 0)
        ]
        table += [{"file_name": "../train/1.png", "text": "up"}, {"file_name": "none.png", "text": "x"}]
        contents[f"{folder}metadata.{kind}"] = table_bytes(kind, table)
    contents["train/1.txt"] = b"a sidecar"
    source = open_source(write_files(tmp_path / where, contents))
    found = said(source)
    train, test = f"train/metadata.{kind} row", f"test/metadata.{kind} row"
    assert found == {
        f"{test} 1: test/deep/2.png": b"test/2",
        f"{test} 2: test/deep/0.png": b"test/0",
        f"{test} 3: test/../train/1.png": "unsafe member name or type",
        f"{test} 4: test/none.png": "image missing",
        f"{train} 1: train/2.png": b"train/2",
        f"{train} 2: train/0.png": b"train/0",
        f"{train} 3: train/../train/1.png": "unsafe member name or type",
        f"{train} 4: train/none.png": "image missing",
        "test/deep/1.png": "caption missing or empty",
        "train/1.png": b"a sidecar",
    }
    assert {r.name for r in records(source) if r.fault is None} >= {"train/0.png", "test/deep/2.png"}


def test_csv_of_every_line_end(tmp_path):
    (tmp_path / "0.png").write_bytes(picture(0))
    for end in (b"\n", b"\r\n", b"\r"):
        lines = [
            b"\xef\xbb\xbfimage,caption",
            b'0.png,"a',
            b'b"',
            b"",
            b"0.png,caf\xe9",
            b"0.png",
            b"0.png,\xc3\xbc,more",
        ]
        (tmp_path / "t.csv").write_bytes(end.join(lines))
        found = records(open_source(tmp_path / "t.csv"))
        assert [record.key for record in found] == [f"row {n}: 0.png" for n in range(1, 5)]
        caption = b"a" + end + b"b"
        assert [record.captions for record in found] == [[caption.decode()], ["caf\udce9"], [], ["ü"]]
        assert [record.fault for record in found] == [None, None, None, "more cells than columns"]


def test_captions_of_several_columns(tmp_path):
    lines = [{"image": "a.png", "short": "s", "long": ["l", 5, "m"], "text": "t"}, {"image": "b.png", "long": None}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = records(open_source(tmp_path / "t.jsonl", caption_columns=["long", "short"]))
    assert [record.captions for record in found] == [["l", "m", "s"], []]
    assert found[0].metadata == {"text": "t"}
    with pytest.raises(InputError, match=r"no caption column 'alt'; its columns are .*: give --caption-column"):
        open_source(tmp_path / "t.jsonl", caption_columns=["long", "alt"])


def test_groups_are_the_same_text_in_every_table(tmp_path):
    (tmp_path / "t.csv").write_text("image,text,group\na.png,x,5\nb.png,y,\n")
    lines = [{"image": "a.png", "text": "x", "group": value} for value in (5, None, "", [1, "b"])]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert groups(open_source(tmp_path / "t.csv"), "group") == ["5", None]
    assert groups(open_source(tmp_path / "t.jsonl"), "group") == ["5", None, None, '[1, "b"]']


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_addresses_are_refused(tmp_path, kind):
    table = [{"url": "https://example.org/a.png", "caption": "x"}]
    (tmp_path / f"t.{kind}").write_bytes(table_bytes(kind, table))
    with pytest.raises(InputError, match=r"has addresses \('url'\) and no images; .*img2dataset"):
        open_source(tmp_path / f"t.{kind}")
    with pytest.raises(InputError, match=r"'url' of .* holds addresses such as 'https.*img2dataset"):
        list(open_source(tmp_path / f"t.{kind}", "url").entries())


def test_column_names_in_capitals(tmp_path):
    (tmp_path / "t.csv").write_text("IMAGE,TEXT,text\na.png,x,y\n")
    source = open_source(tmp_path / "t.csv")
    assert (source.image, source.captions) == ("IMAGE", ("TEXT",))


# ---- parquet and arrow


def test_parquet_rows_across_groups_and_batches(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = [{"img": {"bytes": picture(n % 80), "path": None}, "text": f"number {n}"} for n in range(400)]
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "t.parquet", row_group_size=150)
    source = open_source(tmp_path / "t.parquet")  # "img": the one column of bytes and path
    entries = list(source.entries())
    assert [entry.name for entry in entries] == [f"row {n + 1}" for n in range(400)]
    for number in (0, 1, 70, 149, 150, 399, 3, 299, 300, 64, 63):
        record = source.read(entries[number].place)
        assert (record.image, record.captions) == (picture(number % 80), [f"number {number}"])


def test_a_folder_of_parquet_files(tmp_path):
    for part in range(2):
        data = table_bytes("parquet", [{"image": picture(n), "text": f"{part} {n}"} for n in range(4)])
        write_files(tmp_path, {f"data/train-{part}.parquet": data})
    found = records(open_source(tmp_path))
    assert [record.captions for record in found] == [[f"{part} {n}"] for part in range(2) for n in range(4)]
    assert found[5].key == found[5].name == "data/train-1.parquet row 2"


def test_parquet_text_that_is_not_utf8(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    data = pyarrow.array([b"fine", b"caf\xe9", None], pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"image": [picture(n) for n in range(3)], "text": data})
    parquet.write_table(table, tmp_path / "t.parquet")
    found = list(said(open_source(tmp_path / "t.parquet")).values())
    assert found == [b"fine", "caption not UTF-8", "caption missing or empty"]


def save_dataset(folder, num, files=1, stream=True, **state):
    """As Hugging Face's datasets 4 saves: data-*.arrow in the stream format, state.json and dataset_info.json."""
    pyarrow = pytest.importorskip("pyarrow")

    folder.mkdir(parents=True)
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("picture", kind), ("text", pyarrow.string()), ("label", pyarrow.int64())])
    names = [f"data-{n:05d}-of-{files:05d}.arrow" for n in range(files)]
    for part, name in enumerate(names):
        table = [
            {
                "picture": {"bytes": picture(n), "path": f"{n}.png" if n % 2 else None},
                "text": f"no. {n}",
                "label": n % 3,
            }
            for n in range(part * num, (part + 1) * num)
        ]
        new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
        with new(folder / name, schema) as writer:
            for start in range(0, num, 2):
                writer.write_batch(pyarrow.RecordBatch.from_pylist(table[start : start + 2], schema))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names], **state}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.mark.parametrize("stream", [True, False])
def test_saved_datasets(tmp_path, stream):
    source = open_source(save_dataset(tmp_path / "saved", 5, 2, stream))
    found = records(source)
    assert [record.image for record in found] == [picture(n) for n in range(10)]
    assert [record.captions for record in found] == [[f"no. {n}"] for n in range(10)]
    assert [record.metadata for record in found] == [{"label": n % 3} for n in range(10)]
    assert [record.name for record in found[:2]] == ["data-00000-of-00002.arrow row 1", "1.png"]
    assert found[6].name == "data-00001-of-00002.arrow row 2"
    assert groups(source, "label") == [str(n % 3) for n in range(10)]


def test_saved_splits(tmp_path):
    for name in ("train", "test"):
        save_dataset(tmp_path / "saved" / name, 2)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    source = open_source(tmp_path / "saved")
    assert [record.metadata["split"] for record in records(source)] == ["train"] * 2 + ["test"] * 2
    assert groups(source, "split") == ["train"] * 2 + ["test"] * 2
    assert len(records(open_source(tmp_path / "saved" / "test"))) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dataset_dict.json", "{broken", "is not JSON"),
        ("dataset_dict.json", '{"splits": []}', "names no splits"),
        ("dataset_dict.json", '{"splits": ["val"]}', "lacks the split 'val'"),
        ("state.json", '{"_data_files": [{"filename": "../x.arrow"}]}', "do not lie beside it"),
        ("state.json", '{"_data_files": [{"filename": "x.arrow"}]}', "is no Arrow file"),
        ("state.json", '{"_indices_data_files": [{"filename": "i.arrow"}]}', "flatten_indices"),
        ("data-00000-of-00001.arrow", "neither", "is no Arrow file"),
    ],
)
def test_saved_datasets_refused(tmp_path, name, content, message):
    folder = save_dataset(tmp_path / "saved", 2)
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=message):
        open_source(folder)


def test_a_state_without_data(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds no \.arrow file"):
        open_source(tmp_path)
