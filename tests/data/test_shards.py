"""Indexes against the standard library's tarfile; damage, hostile members, patterns, the writer."""

import io
import pickle  # noqa: TID251  (plants what must never be loaded)
import tarfile
from pathlib import Path

import numpy as np
import pytest
from given_data import given
from PIL import Image

from imagen_lightning.data.datamodule import LaionDataModule
from imagen_lightning.data.shards import (
    CAPTION,
    IMAGE,
    METADATA,
    TEXT_STATES,
    Shards,
    ShardWriter,
    expand_shards,
    index_shard,
    open_shards,
)
from imagen_lightning.data.skips import Reason
from imagen_lightning.types import InputError


def png(color=(10, 200, 30), size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def add(tar, name, data=b"", **attributes):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    tar.addfile(info, io.BytesIO(data))


def write_tar(path, members, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            add(tar, name, data)
    return path


def sample_members(key, number):
    return [
        (f"{key}.jpg", b"image %d" % number * 97),
        (f"{key}.json", b'{"caption": "%d"}' % number),
        (f"{key}.text.npz", bytes([number]) * 600),
        (f"{key}.txt", b"caption %d" % number),
    ]


def contents(index):
    shards = Shards([index])
    return {
        key: [shards.read(0, row, kind) for kind in (IMAGE, METADATA, TEXT_STATES, CAPTION)]
        for row, key in enumerate(index.keys)
    }


def skipped(index):
    return {skip.key: skip.reason for skip in index.skips}


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["", "./", "deep.folder/" * 9, "x" * 150 + "/" + "ü" * 20])
def test_index_gives_the_members_that_tarfile_sees(tmp_path, format_, prefix):
    if format_ == tarfile.USTAR_FORMAT and "ü" in prefix:
        pytest.skip("ustar cannot hold such a name")
    members = [member for number in range(5) for member in sample_members(f"{prefix}{number:04d}", number)]
    hidden = f"{prefix if prefix.endswith('/') else ''}._0000.jpg"
    path = write_tar(tmp_path / "a.tar", [*members, (f"{prefix}README", b"?"), (hidden, b"?")], format=format_)
    index = index_shard(path)
    with tarfile.open(path) as tar:
        expected = {info.name: tar.extractfile(info).read() for info in tar}
    found = contents(index)
    assert len(found) == 5
    assert not index.skips
    assert index.unread == {"not KEY.suffix": 2}
    for key, values in found.items():
        name = key if prefix != "./" else f"./{key}"
        assert values == [expected[f"{name}.{suffix}"] for suffix in ("jpg", "json", "text.npz", "txt")]


@pytest.mark.parametrize("name", ["dcss-tiles-32", "fluent-emoji-3d", "flower-photos-128", "coco-mini-permissive"])
def test_real_shards_are_read_whole(name):
    paths = sorted(given(name).glob("*.tar"))
    index = index_shard(paths[-1])
    assert not index.skips
    with tarfile.open(paths[-1]) as tar:
        infos = {info.name: info for info in tar}
        assert sorted(infos) == sorted(f"{key}.{suffix}" for key in index.keys for suffix in ("webp", "txt", "json"))
        for row in range(0, len(index.keys), 50):
            spans = index.spans[row]
            for kind, suffix in ((IMAGE, "webp"), (CAPTION, "txt"), (METADATA, "json")):
                info = infos[f"{index.keys[row]}.{suffix}"]
                assert spans[kind].tolist() == [info.offset_data, info.size]


def test_no_cut_yields_a_partial_sample(tmp_path):
    members = [sample_members(f"{number:03d}", number) for number in range(3)]
    whole = write_tar(tmp_path / "whole.tar", [member for sample in members for member in sample])
    data = whole.read_bytes()
    expected = contents(index_shard(whole))
    end = len(data.rstrip(b"\0"))
    cuts = sorted({*range(0, end + 1100, 173), *range(0, end + 1100, 512), *range(1, end, 512)})
    for cut in cuts:
        path = tmp_path / "cut.tar"
        path.write_bytes(data[:cut])
        index = index_shard(path)
        found = contents(index)
        assert all(expected[key] == values for key, values in found.items()), cut
        lost = len(found) < 3
        assert lost == (Reason.TRUNCATED_SHARD in skipped(index).values()), cut
        begun = {name.split(".")[0] for name in tarfile_names(data, cut)}
        assert begun <= {*found, *skipped(index)}, cut
    assert found == expected


def tarfile_names(data, cut):
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [info.name for info in tar if info.offset + 512 <= cut]


def test_a_flipped_bit_in_a_header_is_caught(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", [member for n in range(3) for member in sample_members(f"{n:03d}", n)])
    expected = contents(index_shard(whole))
    with tarfile.open(whole) as tar:
        headers = [info.offset for info in tar]
    generator = np.random.default_rng(0)
    for trial in range(200):
        data = bytearray(whole.read_bytes())
        data[headers[trial % len(headers)] + int(generator.integers(512))] ^= 1 << int(generator.integers(8))
        path = tmp_path / "flipped.tar"
        path.write_bytes(data)
        index = index_shard(path)
        assert all(expected[key] == values for key, values in contents(index).items())
        assert len(index.keys) == 3 or Reason.BAD_HEADER in skipped(index).values()


def test_hostile_members_are_refused_and_counted(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("../up", "a/../../up", "/absolute"):
            add(tar, f"{name}.jpg", b"image")
            add(tar, f"{name}.txt", b"caption")
        add(tar, "link.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "link.txt", b"caption")
        add(tar, "hard.jpg", type=tarfile.LNKTYPE, linkname="good.jpg")
        add(tar, "device.jpg", type=tarfile.CHRTYPE)
        add(tar, "pipe.jpg", type=tarfile.FIFOTYPE)
        add(tar, "sparse.jpg", b"x" * 700, type=b"S")
        add(tar, "folder.jpg", type=tarfile.DIRTYPE)
        add(tar, "good.jpg", b"image")
        add(tar, "good.txt", b"caption")
    index = index_shard(tmp_path / "a.tar")
    assert list(index.keys) == ["good"]
    bad = ["../up", "a/../../up", "/absolute", "link", "hard", "device", "pipe", "sparse"]
    assert skipped(index) == dict.fromkeys(bad, Reason.UNSAFE_MEMBER)


def test_duplicate_keys_are_left_out(tmp_path):
    members = [*sample_members("a", 1), *sample_members("b", 2), ("a.jpeg", b"another")]
    index = index_shard(write_tar(tmp_path / "a.tar", members))
    assert list(index.keys) == ["b"]
    assert skipped(index) == {"a": Reason.DUPLICATE_KEY}


class Payload:
    def __reduce__(self):
        return (Path.write_text, (Path(self.target), "executed"))


def test_pickles_in_a_shard_are_never_loaded(tmp_path):
    payload = Payload()
    payload.target = str(tmp_path / "executed")
    states = io.BytesIO()
    np.savez(states, states=np.array([payload], dtype=object), encoder=np.array("t5"))
    members = []
    for number in range(4):
        key = f"{number:03d}"
        members += [(f"{key}.{suffix}", pickle.dumps(payload)) for suffix in ("pyd", "pkl", "pickle", "pt", "cls")]
        members += [(f"{key}.png", png()), (f"{key}.txt", b"green")]
    write_tar(tmp_path / "a.tar", members)
    data = LaionDataModule(str(tmp_path / "a.tar"), image_size=8, batch_size=4)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.captions == ["green"] * 4
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        for number in range(4):
            add(tar, f"{number:03d}.text.npz", states.getvalue())
    with pytest.raises(InputError, match="undecodable text states"):
        LaionDataModule(str(tmp_path / "a.tar"), image_size=8, batch_size=4).setup("fit")
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(payload))  # noqa: S301  (the planted payload does act when loaded)
    assert (tmp_path / "executed").exists()


def test_patterns(tmp_path, monkeypatch):
    for name in ("train-00", "train-01", "train-02", "val-00", "odd[1]"):
        write_tar(tmp_path / f"{name}.tar", [])
    (tmp_path / "notes.txt").write_text("")
    names = lambda found: [path.stem for path in found]  # noqa: E731
    assert names(expand_shards(f"{tmp_path}/train-{{00..02}}.tar")) == ["train-00", "train-01", "train-02"]
    assert names(expand_shards(f"{tmp_path}/{{val,train}}-*.tar")) == ["val-00", "train-00", "train-01", "train-02"]
    assert names(expand_shards([tmp_path / "val-00.tar", f"{tmp_path}/train-0[12].tar"])) == [
        "val-00",
        "train-01",
        "train-02",
    ]
    assert names(expand_shards(tmp_path / "odd[1].tar")) == ["odd[1]"]
    assert len(expand_shards(tmp_path)) == 5
    monkeypatch.chdir(tmp_path)
    assert expand_shards("val-*.tar") == [Path("val-00.tar")]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nothing-*.tar", r"shards '.*nothing-\*\.tar' match no file"),
        ("train-{00..01}.tar", r"train-\{00..01\}.tar' \('.*train-01.tar'\) match no file"),
        ("train-{00..01.tar", "braces do not pair"),
        ("{train-00,train-0*}.tar", "named 2 times"),
    ],
)
def test_patterns_refused(tmp_path, pattern, message):
    write_tar(tmp_path / "train-00.tar", [])
    with pytest.raises(InputError, match=message):
        expand_shards(str(tmp_path / pattern))


@pytest.mark.parametrize("address", ["https://example.org/a.tar", "s3://bucket/a-{0..9}.tar", "pipe:cat a.tar"])
def test_remote_shards_are_refused(address):
    with pytest.raises(InputError, match="only local files"):
        expand_shards(address)


def test_files_that_are_no_shards(tmp_path):

    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as tar:
        add(tar, "a.txt", b"a")
    with pytest.raises(InputError, match="compressed"):
        index_shard(tmp_path / "b.tar.gz")
    (tmp_path / "c.tar").write_bytes(b"this is no tar" * 100)
    assert index_shard(tmp_path / "c.tar").skips[0].reason == Reason.BAD_HEADER
    with pytest.raises(InputError, match=rf"1 of 1 sample cannot .* 'bad tar header', such as {tmp_path / 'c.tar'};"):
        LaionDataModule(str(tmp_path / "c.tar")).setup("fit")
    (tmp_path / "d.tar").write_bytes(b"")
    assert index_shard(tmp_path / "d.tar").skips[0].reason == Reason.TRUNCATED_SHARD
    for name in ("missing.tar", "."):
        with pytest.raises(InputError):
            index_shard(tmp_path / name)


def test_shards_that_vanish_or_shrink_are_faults_of_their_samples(tmp_path):
    from imagen_lightning.data.skips import Unusable

    path = write_tar(tmp_path / "a.tar", sample_members("a", 1))
    index = index_shard(path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(Unusable, match="truncated shard"):
        Shards([index]).read(0, 0, CAPTION)
    path.unlink()
    with pytest.raises(Unusable, match="unreadable shard"):
        Shards([index]).read(0, 0, CAPTION)


def test_writer_and_index_agree(tmp_path):
    with ShardWriter(tmp_path, "train", 3) as writer:
        for number in range(7):
            writer.write(f"{number:09d}", {"jpg": b"j%d" % number, "txt": b"t%d" % number, "json": b"{}"})
            assert len(list(tmp_path.glob("*.tar"))) == (number + 1) // 3
    assert [path.name for path in writer.paths] == [f"train-{n:05d}.tar" for n in range(3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"train-{n:05d}.tar{suffix}" for n in range(3) for suffix in ("", ".index")
    ]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    shards = open_shards(tmp_path, verify="sha256")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before  # the writer's indexes were right
    assert [len(index.keys) for index in shards.indexes] == [3, 3, 1]
    assert shards.sample(1, 2) == (b"j5", b"t5", b"{}", None)
    assert shards.read(1, 2, IMAGE) == b"j5"
    assert shards.read(2, 0, CAPTION) == b"t6"
    assert shards.read(2, 0, TEXT_STATES) is None


def test_writer_that_fails_leaves_only_whole_shards(tmp_path):
    def fail():
        with ShardWriter(tmp_path, "train", 2) as writer:
            for number in range(3):
                writer.write(f"{number}", {"jpg": b"j", "txt": b"t"})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train-00000.tar", "train-00000.tar.index"]
    assert len(index_shard(tmp_path / "train-00000.tar").keys) == 2


def test_writer_on_a_full_disk_leaves_nothing_unfinished(tmp_path, monkeypatch):
    import os

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    writer = ShardWriter(tmp_path, "train", 2)
    with pytest.raises(OSError, match="No space"), writer:
        writer.write("0", {"jpg": b"j", "txt": b"t"})
    assert not list(tmp_path.iterdir())
