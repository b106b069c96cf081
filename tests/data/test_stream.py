"""Tars read forward, against indexed ones; streams, their draws and their faults."""

import functools
import gzip
import http.server
import io
import json
import random
import tarfile
import threading
import time
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from imagen_lightning.data import tape as tape_module
from imagen_lightning.data.dataset import Decoder
from imagen_lightning.data.filters import Filter
from imagen_lightning.data.shards import IMAGE, NUM_KINDS, Shards, index_shard
from imagen_lightning.data.skips import Reason, Skip
from imagen_lightning.data.stream import ShardStream, collate_stream, shuffled, stream_addresses
from imagen_lightning.data.tape import RawSample, SampleReader
from imagen_lightning.errors import InputError


def add(tar, name, data, **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def picture(number, size=(10, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, numbers, change=lambda number, members: members, format_=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=format_) as tar:
        for number in numbers:
            members = {"png": picture(number), "txt": b"number %d" % number}
            members["json"] = json.dumps({"width": 100 + number, "height": 200}).encode()
            for suffix, data in change(number, members).items():
                add(tar, f"{number:05d}.{suffix}", data)
    return str(path)


def read(address):
    """Samples as {key: members}, and skips as {key: reason}."""
    items = list(SampleReader(address))
    samples = {item.key: item.members for item in items if isinstance(item, RawSample)}
    skips = {item.key: item.reason for item in items if isinstance(item, Skip)}
    assert len(samples) + len(skips) == len(items)
    assert all(item.shard == address for item in items)
    return samples, skips


def read_indexed(path):
    index = index_shard(path)
    shards = Shards([index])
    samples = {
        key: [shards.read(0, row, kind) for kind in range(NUM_KINDS)] for row, key in enumerate(list(index.keys))
    }
    return samples, {skip.key: skip.reason for skip in index.skips}


def wild_tar(path):
    """Long names, folders, unknown suffixes, links, unsafe names, doubles, another picture."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "a.jpg", b"image a")
        add(tar, "a.txt", b"a")
        add(tar, "folder/", b"", type=tarfile.DIRTYPE)
        add(tar, f"folder/{'long' * 40}.jpg", b"image of a long name")
        add(tar, f"folder/{'long' * 40}.json", b"{}")
        add(tar, "b.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "b.txt", b"b")
        add(tar, "../evil.jpg", b"evil")
        add(tar, "/absolute.txt", b"absolute")
        add(tar, "c.jpg", b"image c")
        add(tar, "c.png", b"two pictures")
        add(tar, "d.jpg", b"image d")
        add(tar, "d.cls", b"7")
        add(tar, "d.pyd", b"cos\nsystem\n(S'touch /tmp/executed'\ntR.")
        add(tar, "d.txt", b"d")
        add(tar, "e.JPG", b"image e")
        add(tar, "e.Txt", b"e")
        add(tar, "README.md", b"# shards")
        add(tar, "f.jpg", b"", type=tarfile.CHRTYPE)
        add(tar, "g.text.npz", b"states")
        add(tar, "g.jpg", b"image g")
    return str(path)


@pytest.mark.parametrize("make", [wild_tar, lambda path: write_tar(path, range(7))])
def test_samples_and_faults_are_those_of_an_indexed_shard(tmp_path, make):
    tar = make(tmp_path / "a.tar")
    samples, skips = read(tar)
    assert (samples, skips) == read_indexed(tar)
    assert samples


def test_pax_names_are_read(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, f"{'ü' * 120}.jpg", b"image")
        add(tar, f"{'ü' * 120}.txt", b"text")
    assert read(str(tmp_path / "a.tar")) == ({"ü" * 120: [b"image", b"text", None, None]}, {})


@pytest.mark.parametrize("make", [wild_tar, lambda path: write_tar(path, range(6))])
def test_no_cut_gives_a_part_of_a_sample(tmp_path, make):
    whole = (tmp_path / "whole.tar", tmp_path / "cut.tar")
    make(whole[0])
    data = whole[0].read_bytes()
    full, full_skips = read(str(whole[0]))
    mark = -(-len(data.rstrip(b"\0")) // 512) * 512 + 512  # where the first block of zeros ends
    num_torn = 0
    for cut in range(0, len(data), 128):
        whole[1].write_bytes(data[:cut])
        samples, skips = read(str(whole[1]))
        assert samples.items() <= full.items()
        new = {key: reason for key, reason in skips.items() if full_skips.get(key) != reason}
        assert list(new.values()) == ([] if cut >= mark else [Reason.TRUNCATED_SHARD])
        num_torn += cut < mark
        indexed, indexed_skips = read_indexed(whole[1])
        if make is not wild_tar:  # where members lie apart, a cut is blamed on another key
            assert (samples, skips) == (indexed, indexed_skips)
    assert num_torn > 50


def test_a_damaged_header_ends_the_shard_there(tmp_path):
    tar = tmp_path / "a.tar"
    write_tar(tar, range(5))
    data = bytearray(tar.read_bytes())
    place = data.index(b"00003.png")
    for offset in (0, 124, 148, 150):
        damaged = bytearray(data)
        damaged[place + offset] ^= 0x55
        tar.write_bytes(damaged)
        samples, skips = read(str(tar))
        assert (samples, skips) == read_indexed(tar)
        assert list(samples) == ["00000", "00001"]
        assert skips == {"00002": Reason.BAD_HEADER}


def test_a_key_that_comes_again_is_left_out(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key in ("a", "b", "a"):
            add(tar, f"{key}.jpg", b"image")
            add(tar, f"{key}.txt", b"text")
    items = list(SampleReader(str(tmp_path / "a.tar")))
    assert [type(item) for item in items] == [RawSample, RawSample, Skip]
    assert items[2].reason == Reason.DUPLICATE_KEY


def test_a_huge_member_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(tape_module, "MAX_MEMBER_BYTES", 1000)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.jpg", b"x" * 1001)
        add(tar, "a.txt", b"a")
        add(tar, "b.jpg", b"x" * 1000)
    samples, skips = read(str(tmp_path / "a.tar"))
    assert (list(samples), skips) == (["b"], {"a": Reason.UNDECODABLE})


@pytest.mark.parametrize("cut", [None, -1000])
def test_compressed_files_are_read(tmp_path, cut):
    tar = write_tar(tmp_path / "a.tar", range(4))
    packed = gzip.compress((tmp_path / "a.tar").read_bytes())
    (tmp_path / "a.tar.gz").write_bytes(packed[: len(packed) // 2] if cut else packed)
    samples, skips = read(str(tmp_path / "a.tar.gz"))
    full, _ = read(tar)
    if cut:
        assert list(skips.values()) == [Reason.TRUNCATED_SHARD]
        assert samples.items() < full.items()
    else:
        assert (samples, skips) == (full, {})


@pytest.mark.parametrize(
    ("command", "num_samples", "skips"),
    [
        ("cat {}", 5, {}),
        ("gzip -c {} | gzip -dc", 5, {}),
        ("cat {}; exit 3", 5, {}),  # the tar was whole
        ("cat {} -; sleep 100", 5, {}),  # and the command need not end
        ("head -c 5000 {}", 1, {"00001": Reason.TRUNCATED_SHARD}),
        ("head -c 5000 {}; exit 3", 1, {"00001": Reason.UNREADABLE_SHARD}),
        ("true", 0, {"": Reason.TRUNCATED_SHARD}),
        ("false", 0, {"": Reason.UNREADABLE_SHARD}),
        ("yes", 0, {"": Reason.BAD_HEADER}),
    ],
)
def test_commands(tmp_path, command, num_samples, skips):
    tar = write_tar(tmp_path / "a.tar", range(5))
    start = time.monotonic()
    samples, found = read("pipe:" + command.format(tar))
    assert (len(samples), found) == (num_samples, skips)
    assert samples.items() <= read(tar)[0].items()
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("length", [None, 7000])
def test_addresses(tmp_path, length):
    tar = write_tar(tmp_path / "a.tar", range(5))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def copyfile(self, source, target):
            target.write(source.read(length))

    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/a.tar"
        samples, skips = read(address)
        missing = read(address.replace("a.tar", "b.tar"))
        server.shutdown()
    assert missing == ({}, {"": Reason.UNREADABLE_SHARD})
    if length is None:
        assert (samples, skips) == read(tar)
    else:
        assert samples.items() < read(tar)[0].items()
        assert set(skips.values()) <= {Reason.UNREADABLE_SHARD, Reason.TRUNCATED_SHARD}
        assert skips


def test_a_command_needs_the_opt_in(tmp_path):
    write_tar(tmp_path / "a-0.tar", range(2))
    write_tar(tmp_path / "a-1.tar", range(2))
    with pytest.raises(InputError, match=r"'pipe:cat x.tar': a shell would run this command .* allow_pipe: true"):
        stream_addresses([str(tmp_path), "pipe:cat x.tar"])
    found = stream_addresses([str(tmp_path), "pipe:cat {0..1}.tar", "http://host/{a,b}.tar"], allow_pipe=True)
    names = [str(tmp_path / "a-0.tar"), str(tmp_path / "a-1.tar"), "pipe:cat 0.tar", "pipe:cat 1.tar"]
    assert found == [*names, "http://host/a.tar", "http://host/b.tar"]
    for wrong, message in (
        ("pipe:{a", "braces do not pair"),
        (str(tmp_path / "b-*.tar"), "match no file"),
        ("nosuch://host/a.tar", "nosuch"),
    ):
        with pytest.raises(InputError, match=message):
            stream_addresses(wrong, allow_pipe=True)
    with pytest.raises(InputError, match="no shards"):
        stream_addresses([])


def test_the_buffer_shuffles_and_loses_nothing_before_its_end():
    items = [RawSample("a", str(number), []) for number in range(1000)]
    skip = Skip("a", "x", Reason.BAD_JSON)
    given = [item.key for item in shuffled(iter(items), 50, random.Random(1))]
    assert len(given) == len(set(given)) == 1000 - 49
    assert given == [item.key for item in shuffled(iter(items), 50, random.Random(1))]
    assert given != [item.key for item in shuffled(iter(items), 50, random.Random(2))]
    assert np.abs(np.array(given, dtype=int) - np.arange(len(given))).mean() > 10
    assert [item.key for item in shuffled(iter(items), 1, random.Random(1))] == [item.key for item in items]
    assert list(shuffled(iter([items[0], skip, items[1]]), 50, random.Random(1))) == [skip]  # faults do not wait


def stream(shards, rank=0, **settings):
    return ShardStream(shards, Decoder(8), rank=rank, **{"shuffle_buffer": 20, **settings})


def take(dataset, number):
    return list(islice(iter(dataset), number))


def write_tars(folder, num_tars=8, size=25, change=lambda number, members: members):
    return [
        write_tar(folder / f"train-{number:03d}.tar", range(number * size, (number + 1) * size), change)
        for number in range(num_tars)
    ]


def test_pictures_captions_and_keys_belong_together(tmp_path):
    for sample in take(stream(write_tars(tmp_path)), 300):
        number = int(sample.key[-5:])
        assert sample.key == f"train-{number // 25:03d}/{number:05d}"
        assert sample.caption == f"number {number}"
        assert sample.image.shape == (3, 8, 8)
        assert (sample.image[0] == number).all()


def test_workers_processes_and_starts_draw_other_shards(tmp_path):
    shards = write_tars(tmp_path)

    def keys(rank=0, start=0, seed=0):
        dataset = stream(shards, rank, seed=seed)
        dataset.start = start
        return tuple(sample.key for sample in take(dataset, 100))

    assert len({keys(), keys(rank=1), keys(start=400), keys(seed=1)}) == 4
    assert keys(rank=1, start=3, seed=2) == keys(rank=1, start=3, seed=2)

    loader = DataLoader(stream(shards), batch_size=10, num_workers=2, collate_fn=collate_stream)
    batches = list(islice(iter(loader), 20))
    first, second = ([key for batch in batches[number::2] for key in batch.keys] for number in (0, 1))
    assert first != second
    assert tuple(first) == keys()  # worker 0 of process 0
    assert all(len(batch) == 10 for batch in batches)
    again = DataLoader(stream(shards), batch_size=10, num_workers=2, collate_fn=collate_stream)
    assert [batch.keys for batch in islice(iter(again), 20)] == [batch.keys for batch in batches]


def test_every_shard_comes_about_as_often(tmp_path):
    shards = write_tars(tmp_path, num_tars=4, size=5)
    counts = Counter(sample.key.split("/")[0] for sample in take(stream(shards, shuffle_buffer=1), 2000))
    assert len(counts) == 4
    assert max(counts.values()) < 1.4 * min(counts.values())


def test_random_choices_are_the_samples_own(tmp_path):
    def several(number, members):
        return {**members, "png": picture(number, (30, 8)), "txt": b"a\nb\nc"}

    shards = write_tars(tmp_path, 2, change=several)
    dataset = ShardStream(shards, Decoder(8, random_crop=True, random_flip=True), shuffle_buffer=1)
    captions = Counter(sample.caption for sample in take(dataset, 300))
    assert captions.keys() == {"a", "b", "c"}
    assert min(captions.values()) > 60


def test_faults_are_counted_with_the_sample_after_them(tmp_path):
    def spoil(number, members):
        wrong = {
            3: {"png": b"broken"},
            5: {"txt": b"caf\xe9"},
            7: {"png": None},
            9: {"txt": None, "json": None},
            11: {"png": picture(1, (4, 4))},
        }
        return {k: v for k, v in {**members, **wrong.get(number, {})}.items() if v is not None}

    (shard,) = write_tars(tmp_path, 1, change=spoil)
    samples = take(stream([shard], shuffle_buffer=1), 20)
    assert not {int(sample.key[-5:]) for sample in samples} & {3, 5, 7, 9, 11}
    skips = [skip for sample in samples for skip in sample.skips]
    assert {int(skip.key): skip.reason for skip in skips} == {
        3: Reason.UNDECODABLE,
        5: Reason.CAPTION_NOT_UTF8,
        7: Reason.NO_IMAGE,
        9: Reason.NO_CAPTION,
        11: Reason.TOO_SMALL,
    }
    assert {skip.shard for skip in skips} == {shard}


def test_a_stream_of_faults_alone_ends_in_a_sample_without_image(tmp_path):
    (tmp_path / "empty.tar").write_bytes(b"\0" * 10240)
    for shards, reason in (
        (write_tars(tmp_path, 1, 3, lambda number, members: {**members, "png": b"broken"}), Reason.UNDECODABLE),
        ([str(tmp_path / "empty.tar")], Reason.NO_IMAGE),
        ([str(tmp_path / "absent.tar")], Reason.UNREADABLE_SHARD),
    ):
        (sample,) = take(stream(shards), 1)
        assert sample.image is None
        assert {skip.reason for skip in sample.skips} == {reason}
        assert len(sample.skips) == 100


def test_a_filter_removes_by_the_json(tmp_path, monkeypatch):
    shards = write_tars(tmp_path, 2, change=lambda number, m: m if number % 5 else {**m, "json": b"{"})
    samples = take(stream(shards, filter=Filter({"width_min": 120})), 200)
    assert {int(sample.key[-5:]) for sample in samples} == {n for n in range(20, 50) if n % 5}
    batch = collate_stream(samples)
    assert len(batch) == 200
    assert set(batch.filter_counts.removed) == {"width missing", "width_min=120"}
    assert batch.filter_counts.left >= 200
    assert not batch.skips
    monkeypatch.setattr("imagen_lightning.data.stream._MAX_REMOVED", 1000)
    (sample,) = take(stream(shards, filter=Filter({"width_min": 1000})), 1)
    assert sample.image is None
    assert sample.filter_counts.num_samples == 1000


def test_stored_text_states_of_the_encoder_alone(tmp_path):
    def stored(number, members):
        buffer = io.BytesIO()
        np.savez(buffer, states=np.full((2, 4), number, np.float16), encoder=np.array("t5" if number % 2 else "umt5"))
        return {**members, "text.npz": buffer.getvalue()}

    shards = write_tars(tmp_path, 1, change=stored)
    samples = take(ShardStream(shards, Decoder(8, text=("t5", None)), shuffle_buffer=1), 20)
    batch = collate_stream(samples)
    assert torch.equal(batch.text.pooled[:, 0].int(), torch.tensor([int(key[-5:]) for key in batch.keys]).int())
    assert {skip.reason for skip in batch.skips} == {Reason.OTHER_ENCODER}


def test_nothing_of_a_shard_is_executed(tmp_path):
    planted = tmp_path / "executed"
    payload = b"cos\nsystem\n(S'touch %s'\ntR." % str(planted).encode()

    def plant(number, members):
        return {**members, "pyd": payload, "pkl": payload, "pickle": payload, "pth": payload, "npy": payload}

    (shard,) = write_tars(tmp_path, 1, change=plant)
    assert len(take(stream([shard]), 50)) == 50
    assert all(members[IMAGE] != payload for members in read(shard)[0].values())
    assert not planted.exists()
