"""Indexes: fast and exact walks alike, SHA-256 against hashlib, files that are stale, damaged, copied or gone."""

import hashlib
import io
import json
import logging
import os
import tarfile
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from imagen_lightning.data import index as index_module
from imagen_lightning.data import tar as tar_module
from imagen_lightning.data import walk as walk_module
from imagen_lightning.data.index import (
    cache_folder,
    index_bytes,
    index_files,
    index_shard,
    map_shards,
    open_index,
    parse_index,
)
from imagen_lightning.data.shards import CAPTION, IMAGE, METADATA, Shards, ShardWriter, open_shards
from imagen_lightning.data.skips import Reason, Unusable
from imagen_lightning.data.tar import exact_members, members
from imagen_lightning.types import InputError


def write_tar(path, files, format_=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=format_) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(num, size=100, seed=0):
    generator = np.random.default_rng(seed)
    for number in range(num):
        yield f"{number:05d}.jpg", generator.bytes(size + number)
        yield f"{number:05d}.json", b'{"caption": "x", "width": %d}' % number
        yield f"{number:05d}.txt", b"caption %d" % number


def same(first, second):
    """Whether two indexes say the same of a shard's samples."""
    return (
        list(first.keys) == list(second.keys)
        and np.array_equal(first.spans, second.spans)
        and (first.size, first.members, first.fields) == (second.size, second.members, second.fields)
        and [(skip.key, skip.reason) for skip in first.skips] == [(skip.key, skip.reason) for skip in second.skips]
    )


# ---- the walk


def flat(runs):
    return [
        (name, offset, size, run.reason)
        for run in runs
        for name, offset, size in zip(run.names, run.offsets, run.sizes)
    ]


def checksummed(header):
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return header


def odd_tar(path, generator):
    """A tar of ordinary and odd headers, then damaged at random."""
    format_ = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT][generator.integers(3)]
    names = [
        "{n:04d}.jpg",
        "{n:04d}.txt",
        "folder/{n:04d}.json",
        "./{n:04d}.png",
        "{n:04d}.JPG",
        "a.b/../{n}.jpg",
        "..{n}.jpg",
        "{n}..jpg",
        "/{n}.jpg",
        "ordinary{n}",
        ".hidden{n}.jpg",
        "é{n}.webp",
        "l" * 95 + "{n:01.0f}.txt",
        "m" * 70 + "/" + "n" * 60 + "{n}.txt",
        "folder{n}/",
        "",
    ]
    with tarfile.open(path, "w", format=format_) as tar:
        for number in range(generator.integers(1, 25)):
            odd = generator.random() < 0.3
            info = tarfile.TarInfo(names[generator.integers(len(names)) if odd else number % 2].format(n=number // 2))
            info.size = int(generator.integers(0, 1500))
            if generator.random() < 0.1:
                info.type = [tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, b"7", b"S", b"\0"][
                    generator.integers(6)
                ]
            if generator.random() < 0.05 and format_ == tarfile.PAX_FORMAT:
                info.pax_headers = {"comment": "x", "size": str(info.size)}
            try:
                tar.addfile(info, io.BytesIO(bytes(info.size)))
            except (ValueError, UnicodeError):  # a name that the format cannot hold
                continue
    data = bytearray(path.read_bytes())
    choice = generator.random()
    block = 512 * int(generator.integers(len(data) // 512))
    if choice < 0.2:
        del data[int(generator.integers(len(data))) :]
    elif choice < 0.4:
        data[block + int(generator.integers(512))] ^= 1 << int(generator.integers(8))
    elif choice < 0.5:  # a size in base 256
        size = int.from_bytes(data[block + 124 : block + 136], "big") % 2000
        data[block + 124 : block + 136] = b"\x80" + size.to_bytes(11, "big")
        data[block : block + 512] = checksummed(data[block : block + 512])
    elif choice < 0.6:  # bytes after the name's end
        data[block + 60 : block + 100] = generator.bytes(40)
        data[block : block + 512] = checksummed(data[block : block + 512])
    elif choice < 0.7:  # a size with spaces or without end
        data[block + 124 : block + 136] = [b"        120 ", b"000000000120"][generator.integers(2)]
        data[block : block + 512] = checksummed(data[block : block + 512])
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("batch", [1, 3, 8192])
def test_the_fast_walk_gives_what_the_exact_one_gives(tmp_path, monkeypatch, batch):
    monkeypatch.setattr(tar_module, "_BATCH", batch)
    monkeypatch.setattr(tar_module, "_EXACT_RUN", batch)
    if batch == 3:
        monkeypatch.setattr(tar_module, "_MIN_WINDOW", 512)
        monkeypatch.setattr(tar_module, "_MAX_WINDOW", 1500)
    generator = np.random.default_rng(batch)
    num_faults = 0
    for _ in range(150):
        path = odd_tar(tmp_path / "odd.tar", generator)
        descriptor = os.open(path, os.O_RDONLY)
        found = flat(members(descriptor, str(path)))
        assert found == flat(exact_members(descriptor))
        num_faults += sum(reason is not None for *_, reason in found)
        os.close(descriptor)
    assert num_faults > 30


def test_the_fast_walk_leaves_nothing_to_the_exact_one_in_ordinary_shards(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", samples(40))
    descriptor = os.open(path, os.O_RDONLY)
    plain = flat(tar_module.plain_members(descriptor, 0, path.stat().st_size))
    assert len(plain) == 120
    assert plain == flat(exact_members(descriptor))
    os.close(descriptor)


def test_odd_shards_index_alike_through_both_walks(tmp_path, monkeypatch):
    generator = np.random.default_rng(7)
    for _ in range(100):
        path = odd_tar(tmp_path / "odd.tar", generator)
        fast = index_shard(path)
        with monkeypatch.context() as patch:
            patch.setattr(walk_module, "members", lambda descriptor, _: exact_members(descriptor))
            assert same(index_shard(path), fast)


def test_a_negative_size_in_a_pax_header_is_damage(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.pax_headers = {"size": "-900"}
        tar.addfile(info)
    assert [skip.reason for skip in index_shard(path).skips] == [Reason.BAD_HEADER]


# ---- SHA-256


def by_hand(sample):
    """The SHA-256 of a sample, by the description: each member after its kind and length."""
    order = {IMAGE: "jpg", CAPTION: "txt", METADATA: "json", 3: "text.npz"}
    data = b""
    for kind, suffix in order.items():
        if suffix in sample:
            data += bytes([kind]) + len(sample[suffix]).to_bytes(8, "little") + sample[suffix]
    return hashlib.sha256(data).digest()


@pytest.mark.parametrize("size", [10, 5000, 2**19 - 700, 2**20 + 3])
def test_hashes_are_those_of_the_members(tmp_path, size):
    files = list(samples(600 if size < 100 else 6, size))
    first = [file for file in files if file[0].endswith(".json")]
    path = write_tar(tmp_path / "a.tar", [*first, *(file for file in files if file not in first)])  # json lies apart
    index = index_shard(path, hashes=True)
    expected = {}
    for name, data in files:
        key, suffix = name.split(".", 1)
        expected.setdefault(key, {})[suffix] = data
    assert [digest.tobytes() for digest in index.digests()] == [by_hand(expected[key]) for key in index.keys]


def test_members_cannot_trade_bytes(tmp_path):
    def digest(*files):
        return index_shard(write_tar(tmp_path / "a.tar", files), hashes=True).digests().tobytes()

    variants = [
        [("a.jpg", b"xy"), ("a.txt", b"z")],
        [("a.jpg", b"x"), ("a.txt", b"yz")],
        [("a.jpg", b"xyz")],
        [("a.txt", b"xyz")],
        [("a.jpg", b"xyz"), ("a.txt", b"")],
        [("a.jpg", b"xy"), ("a.json", b"z")],
    ]
    assert len({digest(*files) for files in variants}) == len(variants)
    assert digest(*variants[0]) == digest(*variants[0][::-1])  # where a member lies does not count


def test_verified_reading_finds_any_other_byte(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(3))
    index = index_shard(path, hashes=True)
    good = Shards([index], "sha256")
    whole = [good.sample(0, row) for row in range(3)]
    assert whole[1][:3] == (list(samples(3))[3][1], b"caption 1", b'{"caption": "x", "width": 1}')
    data = path.read_bytes()
    for kind in (IMAGE, CAPTION, METADATA):
        offset, length = index.spans[1, kind]
        for place in (offset, offset + length - 1):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            shards = Shards([index], "sha256")
            assert shards.sample(0, 0) == whole[0]
            with pytest.raises(Unusable, match="hash mismatch"):
                shards.sample(0, 1)
            assert Shards([index]).sample(0, 1) != whole[1]
            assert [(skip.key, skip.reason) for skip in shards.damage(0)] == [("00001", Reason.HASH_MISMATCH)]


def test_a_sample_whose_members_lie_far_apart_is_read(tmp_path):
    files = [("a.jpg", b"image"), ("other.bin", bytes(300_000)), ("a.txt", b"caption"), ("a.npy", bytes(10))]
    shards = Shards([index_shard(write_tar(tmp_path / "a.tar", files))])
    assert shards.sample(0, 0) == (b"image", b"caption", None, None)


# ---- the file


def test_an_index_file_is_a_plain_safetensors_file(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*samples(5), ("00002.txt", b"again"), ("00003.cls", b"7")])
    index = open_index(str(path), hashes=True)
    assert index.held is None
    with safe_open(tmp_path / "a.tar.index", "numpy") as file:
        assert sorted(file.keys()) == ["key_ends", "key_text", "sha256", "spans"]
        assert file.get_tensor("key_text").tobytes() == b"00000000010000300004"
        assert file.get_tensor("spans").shape == (4, 4, 2)
        assert json.loads(file.metadata()["index"])["skips"] == [["00002", "DUPLICATE_KEY"]]
    assert index.members == {"txt": 6, "jpg": 5, "json": 5, "cls": 1}
    assert index.fields == ["caption", "width"]
    assert same(index, index_shard(path))
    assert [(skip.shard, skip.key, skip.reason) for skip in index.skips] == [(str(path), "00002", Reason.DUPLICATE_KEY)]
    assert index.missing() == {Reason.NO_IMAGE: 0, Reason.NO_CAPTION: 0}


def test_a_fresh_index_is_read_and_not_made(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", samples(5))
    first = open_index(str(path))
    monkeypatch.setattr(index_module, "walk", lambda *_: pytest.fail("walked again"))
    assert same(open_index(str(path)), first)
    monkeypatch.undo()
    assert open_index(str(path), force=True).file == first.file


def test_a_stale_index_is_made_anew(tmp_path, caplog):
    path = write_tar(tmp_path / "a.tar", samples(5))
    open_index(str(path))
    write_tar(path, samples(6))
    index = open_index(str(path))
    assert index.num_samples == 6
    assert "is stale" in caplog.text
    assert same(index, index_shard(path))
    assert same(parse_index(Path(f"{path}.index").read_bytes(), str(path)), index)


def test_a_change_right_after_indexing_is_noticed(tmp_path):
    path = tmp_path / "a.tar"
    for number in range(20):  # as fast as the clock of file times allows, the same size each time
        write_tar(path, [(f"{number:03d}.jpg", b"x"), (f"{number:03d}.txt", b"y")])
        assert list(open_index(str(path)).keys) == [f"{number:03d}"]


def test_hashes_are_added_where_they_are_missing(tmp_path, caplog):
    path = write_tar(tmp_path / "a.tar", samples(5))
    assert not open_index(str(path)).hashed
    with pytest.raises(Unusable):
        open_index(str(path)).digests()
    index = open_index(str(path), hashes=True)
    assert "has no SHA-256" in caplog.text
    assert np.array_equal(index.digests(), index_shard(path, hashes=True).digests())
    assert open_index(str(path)).hashed


def test_a_copy_keeps_its_hashes_and_shows_damage_of_the_copying(tmp_path, caplog):
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    source = write_tar(tmp_path / "from" / "a.tar", samples(5))
    index = open_index(str(source), hashes=True)
    copy = tmp_path / "to" / "a.tar"
    data = bytearray(source.read_bytes())
    data[int(index.spans[2, IMAGE, 0]) + 5] ^= 4
    copy.write_bytes(data)
    (tmp_path / "to" / "a.tar.index").write_bytes((tmp_path / "from" / "a.tar.index").read_bytes())
    shards = open_shards(copy, verify="sha256")
    assert "its SHA-256 are kept" in caplog.text
    assert [skip.key for skip in shards.damage(0)] == ["00002"]
    again = open_index(str(copy), hashes=True, force=True)
    assert not Shards([again], "sha256").damage(0)


def test_no_damaged_index_is_believed(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*samples(3), ("00001.txt", b"again")])
    good = open_index(str(path), hashes=True)
    data = Path(f"{path}.index").read_bytes()
    for place in range(len(data)):
        damaged = data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :]
        try:
            index = parse_index(damaged, str(path))
        except ValueError:
            continue
        assert same(index, good), place
        assert np.array_equal(index.digests(), good.digests())
    for cut in range(0, len(data), 37):
        with pytest.raises(ValueError):
            parse_index(data[:cut], str(path))


@pytest.mark.parametrize("change", ["flip", "cut", "empty", "other format", "no index"])
def test_a_damaged_index_is_told_and_made_anew(tmp_path, caplog, change):
    path = write_tar(tmp_path / "a.tar", samples(3))
    good = open_index(str(path))
    file = Path(f"{path}.index")
    data = file.read_bytes()
    file.write_bytes(
        {
            "flip": data[:-20] + bytes([data[-20] ^ 1]) + data[-19:],
            "cut": data[:-5],
            "empty": b"",
            "other format": data.replace(b"index 2", b"index 9"),
            "no index": b"\x02\0\0\0\0\0\0\0{}",
        }[change]
    )
    assert same(open_index(str(path)), good)
    assert "cannot be used" in caplog.text
    assert file.read_bytes() == data


def test_spans_beyond_the_shard_are_damage(tmp_path):
    index = index_shard(write_tar(tmp_path / "a.tar", samples(3)))
    for offset, length in ((-2, 1), (0, 2**62), (2**62, 5), (5, -1)):
        spans = index.spans.copy()
        spans[1, IMAGE] = offset, length
        index.held = index.held._replace(spans=spans)
        with pytest.raises(ValueError, match="outside of the shard"):
            parse_index(index_bytes(index), "a.tar")


def test_indexes_of_a_read_only_folder_go_to_the_cache(tmp_path, monkeypatch):
    folder = tmp_path / "shards"
    folder.mkdir()
    path = write_tar(folder / "a.tar", samples(5))
    folder.chmod(0o555)
    try:
        index = open_index(str(path), cache=tmp_path / "cache")
        assert list(folder.iterdir()) == [path]
        assert index.file.parent == tmp_path / "cache" / "indexes"
        monkeypatch.setattr(index_module, "walk", lambda *_: pytest.fail("walked again"))
        assert open_index(str(path), cache=tmp_path / "cache").num_samples == 5
    finally:
        folder.chmod(0o755)


def test_an_index_that_can_be_kept_nowhere_serves_all_the_same(tmp_path, monkeypatch, caplog):
    path = write_tar(tmp_path / "a.tar", samples(5))

    def full(file, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_module, "write_bytes", full)
    index = open_index(str(path), cache=tmp_path)
    assert list(index.keys) == [f"{number:05d}" for number in range(5)]
    assert "can be kept nowhere" in caplog.text
    assert list(tmp_path.iterdir()) == [path]


def test_the_cache_folder(monkeypatch):
    monkeypatch.setenv("IMAGEN_LIGHTNING_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("IMAGEN_LIGHTNING_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/imagen-lightning")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "imagen-lightning"
    assert index_files("x/a.tar", Path("/c"))[0] == Path("x/a.tar.index")


# ---- in use


def test_keys_are_decoded_one_at_a_time(tmp_path):
    names = ["a", "ü" * 40, "x/y z", "日本", "b\nc"]
    files = [(f"{name}.{suffix}", b"x") for name in names for suffix in ("jpg", "txt")]
    path = write_tar(tmp_path / "a.tar", files, tarfile.PAX_FORMAT)
    keys = open_index(str(path)).keys
    assert [keys[row] for row in range(len(keys))] == names
    assert list(keys) == names
    assert keys[-1] == "b\nc"
    assert keys[1:3] == names[1:3]
    assert "日本" in keys
    with pytest.raises(IndexError):
        keys[5]


def test_only_some_shards_take_memory(tmp_path, monkeypatch):
    paths = [write_tar(tmp_path / f"{number:03d}.tar", samples(2)) for number in range(5)]
    shards = open_shards(tmp_path)
    assert [index.held for index in shards.indexes] == [None] * 5
    for shard in range(5):
        assert shards.sample(shard, 1)[CAPTION] == b"caption 1"
    assert index_module._stored_arrays.cache_info().maxsize == 128
    assert paths[0] == shards.indexes[0].path


def test_an_index_that_goes_during_a_run_is_made_from_its_shard(tmp_path, caplog):
    path = write_tar(tmp_path / "a.tar", samples(3))
    index = open_index(str(path), hashes=True)
    shards = Shards([index], "sha256")
    index.file.unlink()
    assert shards.sample(0, 2)[CAPTION] == b"caption 2"
    assert "walked again" in caplog.text
    gone = open_index(str(path), hashes=True)
    gone.file.unlink()
    write_tar(path, samples(4))
    with pytest.raises(Unusable, match="unreadable shard"):
        Shards([gone]).sample(0, 2)
    assert Shards([gone]).key(0, 2) == ""
    path.unlink()
    with pytest.raises(Unusable, match="unreadable shard"):
        Shards([gone]).sample(0, 2)


def test_another_run_that_indexes_anew_changes_nothing(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(3))
    plain = open_index(str(path))
    open_index(str(path), hashes=True)
    assert Shards([plain]).sample(0, 1)[CAPTION] == b"caption 1"
    hashed = open_index(str(path), hashes=True)
    open_index(str(path), hashes=False, force=True)
    assert Shards([hashed], "sha256").sample(0, 1)[CAPTION] == b"caption 1"


def test_an_index_without_its_shard_is_replaced_by_the_next_writer(tmp_path, monkeypatch):
    def write(words):
        with ShardWriter(tmp_path, "train", 5) as writer:
            for number, word in enumerate(words):
                writer.write(f"{number}", {"jpg": b"j", "txt": word})

    replace = os.replace

    def killed(source, target):
        if str(target).endswith(".tar"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write([b"first"])
    assert [path.name for path in tmp_path.iterdir()] == ["train-00000.tar.index"]
    monkeypatch.undo()
    write([b"second", b"third"])
    shards = open_shards(tmp_path, verify="sha256")
    assert [shards.sample(0, row)[CAPTION] for row in range(2)] == [b"second", b"third"]


def _open_all(arguments):
    folder, hashes = arguments
    return [index.num_samples for index in open_shards(folder, verify="sha256" if hashes else "none").indexes]


def test_processes_that_index_at_once_do_not_disturb_each_other(tmp_path):
    for number in range(20):
        write_tar(tmp_path / f"{number:02d}.tar", samples(10))
    with get_context("fork").Pool(4) as pool:
        found = pool.map(_open_all, [(tmp_path, number % 2) for number in range(8)])
    assert found == [[10] * 20] * 8
    assert not list(tmp_path.glob(".*"))
    assert open_index(str(tmp_path / "00.tar")).num_samples == 10


def test_shards_are_mapped_in_order_by_processes_and_an_error_reaches_the_caller(tmp_path):
    paths = [str(write_tar(tmp_path / f"{number:02d}.tar", samples(number))) for number in range(1, 5)]
    assert [index.num_samples for index in map_shards(open_index, paths, processes=2)] == [1, 2, 3, 4]
    assert [index.num_samples for index in map_shards(open_index, paths)] == [1, 2, 3, 4]
    with pytest.raises(InputError, match="cannot be read"):
        list(map_shards(open_index, [*paths, str(tmp_path / "missing.tar")]))


def test_verify_takes_no_other_word(tmp_path):
    write_tar(tmp_path / "a.tar", samples(1))
    with pytest.raises(InputError, match="verify 'md5' is unknown"):
        open_shards(tmp_path, verify="md5")


@pytest.mark.parametrize("logger", ["imagen_lightning"])
def test_messages_name_the_index(tmp_path, caplog, logger):
    path = write_tar(tmp_path / "a.tar", samples(1))
    open_index(str(path))
    Path(f"{path}.index").write_bytes(b"x")
    with caplog.at_level(logging.WARNING, logger):
        open_index(str(path))
    assert f"index {path}.index cannot be used: " in caplog.text
