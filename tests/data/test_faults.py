"""Faults injected into shards: no crash, no partial sample, nothing executed, each fault counted under its reason.

The short forms draw a part of what the long ones (`make test-faults`) go through; both count what they inject.
"""

import io
import json
import os
import pickle  # noqa: TID251  (plants what must never be loaded)
import resource
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imagen_lightning.data.datamodule import LaionDataModule
from imagen_lightning.data.index import index_shard, open_index
from imagen_lightning.data.shards import NUM_KINDS, Shards
from imagen_lightning.data.skips import Reason, Unusable
from imagen_lightning.types import InputError

short_and_long = pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.faults)])

SIZE = 8
SUFFIXES = ("png", "txt", "json", "text.npz")


def picture(number, size=(12, 10), format_="PNG"):
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format_)
    return buffer.getvalue()


def stored(number, encoder="t5", **arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **{"states": np.full((3, 4), number % 100, np.float16), "encoder": np.array(encoder), **arrays})
    return buffer.getvalue()


def good(number):
    """A sample without fault."""
    return {
        "png": picture(number),
        "txt": b"number %d" % number,
        "json": b'{"caption": "number %d"}' % number,
        "text.npz": stored(number),
    }


def write(path, samples):
    """A tar of (key, members) pairs; members are by suffix, as bytes or as attributes of a TarInfo."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for key, members in samples:
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                if isinstance(data, dict):
                    for name, value in data.items():
                        setattr(info, name, value)
                    data = b""
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def forget_index(path):
    Path(f"{path}.index").unlink(missing_ok=True)


class Outcome:
    """What a run through a shard gives.

    Attributes:
        samples: those that reach training, by key.
        stopped: the line that stops a run without any.
        reasons: how many skips of each reason.
        keys: the reason of each key that was skipped.
    """

    def __init__(self, path, **settings):
        data = LaionDataModule(
            str(path), str(path), image_size=SIZE, batch_size=4, max_skip_share=1.0, text_encoder="t5", **settings
        )
        self.samples = {}
        self.stopped = ""
        self.late = []
        try:
            self.read(data.validation_set())
        except InputError as error:
            self.stopped = str(error)  # a shard without a usable sample stops the run, with the reason that leads
        skips = [*data.val_skips._seen, *self.late]
        self.reasons = Counter(skip.reason for skip in skips)
        self.keys = {skip.key: skip.reason for skip in skips}

    def read(self, dataset):
        found = [dataset[position] for position in range(len(dataset))]
        self.late = [skip for sample in found for skip in sample.skips]
        self.samples = {sample.key.split("/", 1)[1]: sample for sample in found if sample.image is not None}


def same(first, second):
    return (
        torch.equal(first.image, second.image)
        and first.caption == second.caption
        and (first.text is None) == (second.text is None)
        and (first.text is None or torch.equal(first.text.states, second.text.states))
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A shard without fault: its bytes, its samples and its index with SHA-256."""
    path = tmp_path_factory.mktemp("whole") / "train-000.tar"
    write(path, [(f"{number:04d}", good(number)) for number in range(5)])
    index = open_index(str(path), hashes=True)
    return path.read_bytes(), Outcome(path).samples, index


def test_the_shard_without_fault(whole, tmp_path):
    data, samples, index = whole
    assert list(samples) == [f"{number:04d}" for number in range(5)]
    (tmp_path / "train-000.tar").write_bytes(data)
    assert not Outcome(tmp_path / "train-000.tar", verify="sha256").reasons
    assert [sample.caption for sample in samples.values()] == [f"number {number}" for number in range(5)]
    assert samples["0003"].text.states.unique().tolist() == [3.0]
    assert index.hashed


# ---- cuts


@short_and_long
def test_cuts(whole, tmp_path, long):
    data, samples, index = whole
    path = tmp_path / "train-000.tar"
    ends = index.spans.sum(2).max(1)  # where each sample's last byte lies
    starts = index.spans[:, :, 0].min(1) - 512
    mark = -(-int(ends.max()) // 512) * 512 + 512  # the end of the first block of zeros
    cuts = list(range(0, len(data), 512)) + (list(range(1, len(data), 97)) if long else [])
    cuts = cuts if long else cuts[::3]
    for cut in cuts:
        path.write_bytes(data)
        opened = Shards([index_shard(path, hashes=True)])  # before the damage
        os.truncate(path, cut)
        for row in range(5):
            if ends[row] <= cut:
                assert opened.sample(0, row) == Shards([index]).sample(0, row)
            else:
                with pytest.raises(Unusable, match="truncated shard"):
                    opened.sample(0, row)
        forget_index(path)
        found = Outcome(path)  # after the damage
        assert all(same(sample, samples[key]) for key, sample in found.samples.items()), cut
        assert set(found.samples) >= {f"{row:04d}" for row in range(5) if ends[row] + 1536 <= cut}
        assert found.reasons == ({Reason.TRUNCATED_SHARD: 1} if cut < mark else {}), cut
        assert bool(found.samples) != ("'truncated shard'" in found.stopped)
        begun = {f"{row:04d}" for row in range(5) if starts[row] + 512 <= cut}
        assert begun <= {*found.samples, *found.keys}, cut
    print(f"\n{2 * len(cuts)} cuts")


# ---- flipped bits


def flips(data, places, generator):
    for place in places:
        yield place, data[place] ^ (1 << int(generator.integers(8)))


def put(path, place, value):
    """Overwrites a byte as a failing disk does: size and times stay."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes([value]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@short_and_long
def test_hashes_catch_every_flipped_bit_of_a_member(whole, tmp_path, long):
    data, _, index = whole
    path = tmp_path / "train-000.tar"
    path.write_bytes(data)
    shards = Shards([open_index(str(path), hashes=True)], "sha256")
    truth = [shards.sample(0, row) for row in range(5)]
    owner = {
        place: row
        for row in range(5)
        for offset, length in index.spans[row].tolist()
        for place in range(offset, offset + length)
    }
    places = list(owner) if long else list(owner)[::61]
    num = 0
    for place in places:
        for bit in range(8) if long else [place % 8]:
            put(path, place, data[place] ^ (1 << bit))
            with pytest.raises(Unusable, match="hash mismatch"):
                shards.sample(0, owner[place])
            other = (owner[place] + 1) % 5
            assert shards.sample(0, other) == truth[other]
            num += 1
        put(path, place, data[place])
    assert [shards.sample(0, row) for row in range(5)] == truth
    print(f"\n{num} bits of members flipped, each caught")


@short_and_long
def test_flipped_bits_with_the_index_made_before(whole, tmp_path, long):
    """What lies between the members matters to nobody; what lies within is caught, under its reason."""
    data, samples, index = whole
    path = tmp_path / "train-000.tar"
    path.write_bytes(data)
    open_index(str(path), hashes=True)
    inside = np.zeros(len(data), dtype=bool)
    for offset, length in index.spans.reshape(-1, 2).tolist():
        inside[offset : offset + length] = True
    places = range(0, len(data), 7 if long else 307)
    for place, value in flips(data, places, np.random.default_rng(0)):
        put(path, place, value)
        found = Outcome(path, verify="sha256")
        assert found.reasons == ({Reason.HASH_MISMATCH: 1} if inside[place] else {}), place
        assert len(found.samples) == 5 - inside[place]
        assert all(same(sample, samples[key]) for key, sample in found.samples.items())
        put(path, place, data[place])
    print(f"\n{len(places)} bits flipped after indexing")


@short_and_long
def test_flipped_bits_with_the_index_made_after(whole, tmp_path, long):
    """Without hashes a flipped bit may change what a member says, but it never costs a sample one of its members."""
    data, samples, index = whole
    path = tmp_path / "train-000.tar"
    path.write_bytes(data)
    inside = np.zeros(len(data), dtype=bool)
    for offset, length in index.spans.reshape(-1, 2).tolist():
        inside[offset : offset + length] = True
    places = range(0, len(data), 3 if long else 301)
    lengths = {key: index.spans[row, :, 1].tolist() for row, key in enumerate(index.keys)}
    for place, value in flips(data, places, np.random.default_rng(1)):
        put(path, place, value)
        forget_index(path)
        walked = index_shard(path)
        assert all(walked.spans[row, :, 1].tolist() == lengths[key] for row, key in enumerate(walked.keys)), place
        found = Outcome(path)
        if inside[place]:
            assert len(found.samples) + found.reasons.total() == 5
            assert sum(not same(sample, samples[key]) for key, sample in found.samples.items()) <= 1
        else:
            assert all(same(sample, samples[key]) for key, sample in found.samples.items()), place
            assert set(found.reasons) <= {Reason.BAD_HEADER}
            assert len(found.samples) == 5 or found.reasons[Reason.BAD_HEADER] == 1
        assert all(sample.text is not None and sample.caption for sample in found.samples.values())
        put(path, place, data[place])
    print(f"\n{len(places)} bits flipped before indexing")


# ---- each reason


def png_of(width, height):
    """A PNG whose header claims a size; there are no pixels in it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def jpeg_of(width, height):
    data = bytearray(picture(0, (64, 64), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def zip_of(members, method=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npy_of(shape, data=b""):
    """An npy file whose header claims a shape."""
    text = f"{{'descr': '<f2', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def lying_zip():
    """A zip whose directory says that a gigabyte of zeros is one byte."""
    data = bytearray(zip_of({"states.npy": bytes(2**20), "encoder.npy": npy(np.array("t5"))}))
    for mark, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = data.index(mark) + place
        data[start : start + 4] = struct.pack("<I", 1)
    return bytes(data)


def damaged_lzma():
    data = bytearray(zip_of({"states.npy": npy(np.ones((3, 4), np.float16)) * 40}, zipfile.ZIP_LZMA))
    data[60:80] = b"\xff" * 20
    return bytes(data)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (Path.write_text, (Path(self.target), "executed"))


def pickled(target):
    return stored(0, states=np.array([Payload(target)], dtype=object))


def without(*suffixes):
    return lambda number, _: {name: data for name, data in good(number).items() if name not in suffixes}


def instead(**members):
    def spoil(number, target):
        made = {name: data(target) if callable(data) else data for name, data in members.items()}
        return {**good(number), **{name.replace("_", "."): data for name, data in made.items()}}

    return spoil


def half(format_, share):
    def spoil(number, _):
        data = picture(number, (40, 40), format_)
        return {**good(number), "png": data[: int(len(data) * share)]}

    return spoil


CASES = {
    "no image": (without("png"), Reason.NO_IMAGE),
    "no caption": (without("txt", "json"), Reason.NO_CAPTION),
    "empty caption": (instead(txt=b""), Reason.NO_CAPTION),
    "caption of spaces": (instead(txt=b" \n\t \n"), Reason.NO_CAPTION),
    "latin-1 caption": (instead(txt=b"caf\xe9"), Reason.CAPTION_NOT_UTF8),
    "utf-16 caption": (instead(txt="abc".encode("utf-16")), Reason.CAPTION_NOT_UTF8),
    "cut utf-8": (instead(txt="é".encode()[:1]), Reason.CAPTION_NOT_UTF8),
    "bad json": (lambda n, _: {**without("txt")(n, _), "json": b"{"}, Reason.BAD_JSON),
    "deep json": (lambda n, _: {**without("txt")(n, _), "json": b"[" * 200_000}, Reason.BAD_JSON),
    "json of one number": (lambda n, _: {**without("txt")(n, _), "json": b"7"}, Reason.NO_CAPTION),
    "json without caption": (lambda n, _: {**without("txt")(n, _), "json": b'{"url": 1}'}, Reason.NO_CAPTION),
    "cut png": (half("PNG", 0.6), Reason.TRUNCATED_IMAGE),
    "cut jpeg": (half("JPEG", 0.8), Reason.TRUNCATED_IMAGE),
    "cut webp": (half("WEBP", 0.6), Reason.UNDECODABLE),
    "empty image": (instead(png=b""), Reason.UNDECODABLE),
    "text as image": (instead(png=b"<html>not found</html>"), Reason.UNDECODABLE),
    "gif as image": (instead(png=picture(1, format_="GIF")), Reason.UNDECODABLE),
    "png bomb": (instead(png=png_of(60_000, 60_000)), Reason.TOO_MANY_PIXELS),
    "png of the largest size": (instead(png=png_of(2**31 - 1, 2**31 - 1)), Reason.TOO_MANY_PIXELS),
    "jpeg bomb": (instead(png=jpeg_of(65_500, 65_500)), Reason.TOO_MANY_PIXELS),
    "small image": (instead(png=picture(1, (7, 30))), Reason.TOO_SMALL),
    "duplicate key": (lambda n, _: {**good(n), "jpg": picture(n, format_="JPEG")}, Reason.DUPLICATE_KEY),
    "symbolic link": (instead(png={"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}), Reason.UNSAFE_MEMBER),
    "hard link": (instead(png={"type": tarfile.LNKTYPE, "linkname": "0000.png"}), Reason.UNSAFE_MEMBER),
    "character device": (instead(txt={"type": tarfile.CHRTYPE}), Reason.UNSAFE_MEMBER),
    "block device": (instead(json={"type": tarfile.BLKTYPE}), Reason.UNSAFE_MEMBER),
    "pipe": (instead(txt={"type": tarfile.FIFOTYPE}), Reason.UNSAFE_MEMBER),
    "sparse file": (instead(txt={"type": b"S"}), Reason.UNSAFE_MEMBER),
    "no text states": (without("text.npz"), Reason.NO_TEXT_STATES),
    "no npz": (instead(text_npz=b"PK\x03\x04"), Reason.BAD_TEXT_STATES),
    "pickled states": (instead(text_npz=pickled), Reason.BAD_TEXT_STATES),
    "states of integers": (instead(text_npz=stored(1, states=np.ones((3, 4), np.int32))), Reason.BAD_TEXT_STATES),
    "states of another width": (
        instead(text_npz=stored(1, states=np.ones((3, 5), np.float16))),
        Reason.BAD_TEXT_STATES,
    ),
    "zip bomb": (
        instead(text_npz=zip_of({"states.npy": bytes(2**28 + 1), "encoder.npy": npy(np.array("t5"))})),
        Reason.BAD_TEXT_STATES,
    ),
    "lying zip": (instead(text_npz=lying_zip()), Reason.BAD_TEXT_STATES),
    "npy bomb": (
        instead(text_npz=zip_of({"states.npy": npy_of("(1000000000000, 4)"), "encoder.npy": npy(np.array("t5"))})),
        Reason.BAD_TEXT_STATES,
    ),
    "npy of a terabyte that may be had": (
        instead(text_npz=zip_of({"states.npy": npy_of("(2000000000, 4)"), "encoder.npy": npy(np.array("t5"))})),
        Reason.BAD_TEXT_STATES,
    ),
    "npy with a broken header": (
        instead(text_npz=zip_of({"states.npy": npy_of("((((3, 4)"), "encoder.npy": npy(np.array("t5"))})),
        Reason.BAD_TEXT_STATES,
    ),
    "zip of damaged LZMA": (instead(text_npz=lambda _: damaged_lzma()), Reason.BAD_TEXT_STATES),
    "NaN": (instead(text_npz=stored(1, states=np.full((3, 4), np.nan, np.float16))), Reason.NAN_TEXT_STATES),
    "infinity": (instead(text_npz=stored(1, states=np.full((3, 4), np.inf, np.float32))), Reason.NAN_TEXT_STATES),
    "another encoder": (instead(text_npz=stored(1, "clip")), Reason.OTHER_ENCODER),
}


@pytest.mark.parametrize("name", CASES)
def test_each_fault_is_counted_under_its_reason(tmp_path, name):
    spoil, reason = CASES[name]
    path = tmp_path / "train-000.tar"
    key = "0002"
    write(path, [(f"{n:04d}", spoil(n, tmp_path / "executed") if n == 2 else good(n)) for n in range(5)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = Outcome(path)
    assert found.keys == {key: reason}
    assert list(found.samples) == ["0000", "0001", "0003", "0004"]
    assert not (tmp_path / "executed").exists()
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 * 1024
    )  # KiB; the limit of pixels is 256 MiB


@pytest.mark.parametrize("name", ["../0002", "a/../../0002", "/0002", "/etc/0002"])
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    path = tmp_path / "train-000.tar"
    write(path, [("0001", good(1)), (name, good(2)), ("0003", good(3))])
    found = Outcome(path)
    assert found.keys == {name: Reason.UNSAFE_MEMBER}
    assert list(found.samples) == ["0001", "0003"]


def test_a_shard_that_goes_while_it_is_read(tmp_path):
    path = write(tmp_path / "train-000.tar", [(f"{n:04d}", good(n)) for n in range(3)])
    data = LaionDataModule(str(path), str(path), image_size=SIZE, batch_size=4, text_encoder="t5")
    dataset = data.validation_set()
    dataset.shards.close()
    path.unlink()
    found = [dataset[position] for position in range(3)]
    assert all(sample.image is None for sample in found)
    assert [skip.reason for sample in found for skip in sample.skips] == [Reason.UNREADABLE_SHARD] * 3


def test_every_reason_has_its_fault():
    elsewhere = {Reason.TRUNCATED_SHARD, Reason.BAD_HEADER, Reason.HASH_MISMATCH, Reason.UNREADABLE_SHARD}
    elsewhere |= {Reason.OTHER_FORMAT, Reason.BAD_ROW}  # of folders and tables: test_counting.py
    assert {reason for _, reason in CASES.values()} | elsewhere == set(Reason)


# ---- nothing is executed


PLANTED = ("pyd", "pkl", "pickle", "pth", "pt", "cls", "npy", "npz", "ten", "tar", "py", "so", "cbor", "mp", "json.pkl")


def test_planted_members_are_not_even_read(tmp_path):
    target = tmp_path / "executed"
    payload = pickle.dumps(Payload(target))
    path = tmp_path / "train-000.tar"
    write(path, [(f"{n:04d}", {**dict.fromkeys(PLANTED, payload), **good(n)}) for n in range(4)])
    index = index_shard(path)
    assert {suffix: index.members[suffix] for suffix in PLANTED} == dict.fromkeys(PLANTED, 4)
    spans = index.spans.reshape(-1, 2).tolist()
    data = path.read_bytes()
    planted = [place for place in range(0, len(data), 512) if data.startswith(payload, place)]
    assert len(planted) == 4 * len(PLANTED)
    assert not any(offset <= place < offset + length for place in planted for offset, length in spans)
    found = Outcome(path)
    assert len(found.samples) == 4
    assert not found.reasons
    assert not target.exists()
    pickle.loads(payload)  # noqa: S301  (the planted payload does act when loaded)
    assert target.exists()


# ---- all of them together, through the loader


@short_and_long
@pytest.mark.parametrize("num_workers", [0, 2])
def test_faults_of_all_kinds_in_training(tmp_path, long, num_workers):
    """The counts are those of what was injected, and what reaches training are whole samples without fault."""
    num = 1500 if long else 150
    generator = np.random.default_rng(num)
    names = list(CASES)
    chosen = dict(zip(generator.permutation(num)[: num * 2 // 3].tolist(), (names * num)[: num * 2 // 3]))
    target = tmp_path / "executed"
    made = {name: spoil(1, target) for name, (spoil, _) in CASES.items() if "bomb" in name}
    for shard in range(3):
        numbers = range(shard * num // 3, (shard + 1) * num // 3)
        samples = []
        for n in numbers:
            name = chosen.get(n)
            samples.append((f"{n:05d}", made[name] if name in made else CASES[name][0](n, target) if name else good(n)))
        write(tmp_path / f"train-{shard:03d}.tar", samples)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    data = LaionDataModule(
        str(tmp_path),
        image_size=SIZE,
        batch_size=10,
        num_workers=num_workers,
        max_skip_share=1.0,
        text_encoder="t5",
        verify="sha256",
    )
    loader = iter(data.train_dataloader())
    seen = Counter()
    for _ in range(num * 3 // 10):  # three epochs: replacements too are drawn from good and bad
        batch = next(loader)
        data.train_skips.note(batch.skips)
        for key, caption, image, states in zip(batch.keys, batch.captions, batch.images, batch.text.states):
            number = int(key.split("/")[1])
            seen[number] += 1
            assert caption == f"number {number}"
            assert (states[:3] == number % 100).all()
            assert image.shape == (3, SIZE, SIZE)
    assert not set(seen) & set(chosen)
    assert set(seen) == set(range(num)) - set(chosen)
    expected = Counter(CASES[name][1].value for name in chosen.values())
    assert data.train_skips.counts == expected
    assert not target.exists()
    print(f"\n{len(chosen)} faults of {len(CASES)} kinds, each under its reason: {json.dumps(expected)}")


def test_kinds_are_those_of_a_sample():
    assert len(SUFFIXES) == NUM_KINDS
