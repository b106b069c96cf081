"""Buckets: their sizes, which sample goes where, and training batches of one size each."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from fitting import train
from lightning.pytorch import LightningModule
from PIL import Image

from imagen_lightning.data.buckets import bucket_sizes, merge_small, nearest_buckets, read_sizes
from imagen_lightning.data.datamodule import LaionDataModule
from imagen_lightning.data.shards import Shards, index_shard
from imagen_lightning.types import InputError

SIZES = [(30, 20), (20, 30), (24, 24), (64, 32), (25, 24), (40, 24), (24, 40), (48, 90)]  # width, height


@pytest.mark.parametrize(("image_size", "step"), [(64, None), (64, 16), (64, 4), (256, None), (1024, 128), (8, None)])
def test_sizes_of_buckets(image_size, step):
    sizes = bucket_sizes(image_size, step)
    step = step or image_size // 8
    assert (image_size, image_size) in sizes
    assert {(width, height) for height, width in sizes} == set(sizes)
    for height, width in sizes:
        assert height % step == width % step == 0
        assert 0.5 <= width / height <= 2
        assert 0.9 <= height * width / image_size**2 <= 1.1
    assert [w / h for h, w in sizes] == sorted(w / h for h, w in sizes)


def test_stages_of_a_cascade_have_the_same_buckets():
    assert [(4 * h, 4 * w) for h, w in bucket_sizes(64)] == bucket_sizes(256)
    assert bucket_sizes(64) == [
        *[(88, 48), (80, 48), (80, 56), (72, 56)],
        (64, 64),
        *[(56, 72), (56, 80), (48, 80), (48, 88)],
    ]


@pytest.mark.parametrize(("image_size", "step"), [(60, None), (64, 24), (64, 0), (64, 2), (64, -8)])
def test_steps_that_are_refused(image_size, step):
    with pytest.raises(InputError, match="bucket_step"):
        bucket_sizes(image_size, step)


def test_nearest_in_aspect():
    sizes = bucket_sizes(64)
    generator = np.random.default_rng(0)
    widths, heights = generator.integers(50, 3000, (2, 300)).astype(float)
    widths[7] = np.nan
    numbers = nearest_buckets(widths, heights, sizes)
    for width, height, number in zip(widths, heights, numbers, strict=True):
        cost = [max(w / h / (width / height), width / height / (w / h)) for h, w in sizes]
        assert np.isnan(width) or cost[number] == min(cost)
    assert sizes[numbers[7]] == (64, 64)
    assert numbers.dtype == np.uint8


def test_small_buckets_go_to_their_neighbours():
    sizes = bucket_sizes(64, 16)  # tall, square, wide
    buckets = [np.array([0, 1, 1, 1], np.uint8), np.array([2, 2, 2, 1], np.uint8)]
    assert merge_small(buckets, sizes, 1)[1] == [1, 4, 3]
    merged, counts = merge_small(buckets, sizes, 3)
    assert [numbers.tolist() for numbers in merged] == [[1, 1, 1, 1], [2, 2, 2, 1]]
    assert counts == [0, 5, 3]
    merged, counts = merge_small(buckets, sizes, 100)
    assert [numbers.tolist() for numbers in merged] == [[1] * 4] * 2
    assert counts == [0, 8, 0]


def picture(number, size, format_="PNG", **options):
    buffer = io.BytesIO()
    Image.new("RGB", size, (number, 7, 9)).save(buffer, format_, **options)
    return buffer.getvalue()


def write_shards(folder, sizes, change=lambda number, members: members):
    """Shards whose sample `number` shows it as a red value, has a size of `SIZES` and says both in its caption."""
    number = 0
    for shard, count in enumerate(sizes):
        with tarfile.open(folder / f"train-{shard:03d}.tar", "w") as tar:
            for _ in range(count):
                size = SIZES[number * 7 % len(SIZES)]
                members = {"png": picture(number, size), "txt": f"{number} {size[0]} {size[1]}".encode()}
                for suffix, data in change(number, members).items():
                    info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                number += 1
    return str(folder / "train-*.tar")


def test_sizes_come_from_the_metadata_or_the_header(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6

    def change(number, members):
        if number == 0:
            return {**members, "json": b'{"width": 300, "height": 200}'}
        if number == 1:
            return {"jpg": picture(1, (50, 20), "JPEG", exif=exif), "txt": b"turned"}
        if number == 2:
            return {**members, "png": b"broken"}
        if number == 3:  # the size lies far behind the profile
            return {"jpg": picture(3, (70, 30), "JPEG", icc_profile=b"x" * 50_000), "txt": b"far"}
        return members

    write_shards(tmp_path, [5], change)
    path = tmp_path / "train-000.tar"
    widths, heights = read_sizes(Shards([index_shard(path)]), 0, np.arange(5), path, tmp_path)
    assert widths[[0, 1, 3, 4]].tolist() == [300, 20, 70, SIZES[28 % len(SIZES)][0]]
    assert heights[[0, 1, 3, 4]].tolist() == [200, 50, 30, SIZES[28 % len(SIZES)][1]]
    assert np.isnan([widths[2], heights[2]]).all()


def batches(data, count):
    loader = iter(data.train_dataloader())
    return [next(loader) for _ in range(count)]


def data_of(shards, **settings):
    return LaionDataModule(shards, **{"image_size": 16, "batch_size": 4, "window": 2, "crop": "bucket", **settings})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_have_one_size_and_every_sample_its_turn(tmp_path, num_workers):
    shards = write_shards(tmp_path, [19, 30, 11, 20])
    seen = {}
    for batch in batches(data_of(shards, num_workers=num_workers), 90):  # four and a half epochs
        numbers = batch.images[:, 0].flatten(1).float().mean(1).int().tolist()
        assert [caption.split()[0] for caption in batch.captions] == [str(number) for number in numbers]
        height, width = batch.images.shape[-2:]
        assert (height, width) in bucket_sizes(16)
        for caption in batch.captions:
            _, w, h = map(int, caption.split())
            # no bucket but a neighbour is nearer
            assert abs(np.log(width / height) - np.log(w / h)) < 0.35
        seen.setdefault((height, width), []).extend(numbers)
    everything = []
    for numbers in seen.values():
        epoch = len(set(numbers))
        for start in range(0, len(numbers) - epoch + 1, epoch):
            assert len(set(numbers[start : start + epoch])) == epoch
        everything += set(numbers)
    assert sorted(everything) == list(range(80))
    assert len(seen) >= 5
    assert (16, 16) in seen


def test_processes_get_parts_of_one_batch(tmp_path, monkeypatch):
    shards = write_shards(tmp_path, [19, 30, 11, 20])
    whole = batches(data_of(shards), 20)
    parts = []
    for rank in range(2):
        data = data_of(shards)
        monkeypatch.setattr(data, "_process", lambda rank=rank: (rank, 2))
        parts.append(batches(data, 20))
    for batch, first, second in zip(whole, *parts, strict=True):
        assert batch.keys == first.keys + second.keys
        assert torch.equal(batch.images, torch.cat([first.images, second.images]))


def test_images_keep_their_aspect(tmp_path):
    """A picture of 4 x 3 squares in a bucket of its aspect shows all of them."""
    pixels = np.kron(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20, np.ones((30, 30), np.uint8))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    shards = write_shards(tmp_path, [8], lambda number, members: {**members, "png": buffer.getvalue()})
    (batch,) = batches(data_of(shards, image_size=64), 1)
    assert batch.images.shape == (4, 3, 56, 72)  # nearest to 4:3
    corners = batch.images[0, 0, [2, -3], :][:, [2, -3]]
    assert corners.flatten().tolist() == [0, 60, 160, 220]
    data = LaionDataModule(shards, shards, image_size=64, batch_size=4, crop="bucket")
    assert next(iter(data.val_dataloader())).images.shape == (4, 3, 64, 64)


def test_what_cannot_be_used_is_replaced_from_its_bucket(tmp_path):
    def spoil(number, members):
        # the header says the size, the rest is missing
        return {**members, "png": members["png"][:60]} if number % 11 == 5 else members

    data = data_of(write_shards(tmp_path, [30, 30], spoil), max_skip_share=0.5)
    numbers = []
    for batch in batches(data, 40):
        assert len(batch) == 4
        numbers += [int(caption.split()[0]) for caption in batch.captions]
    assert set(numbers) == {number for number in range(60) if number % 11 != 5}


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.keys, self.shapes = [], []

    def training_step(self, batch, _):
        self.keys.extend(batch.keys)
        self.shapes.append(tuple(batch.images.shape[-2:]))
        return self.weight * batch.images.float().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, folder, steps, resume=None, **settings):
    module = Recorder()
    train(module, data, folder, steps, resume, **settings)
    return module


def test_resume_goes_on_with_the_next_batch(tmp_path):
    shards = write_shards(tmp_path, [19, 30, 11, 20])
    whole = fit(data_of(shards), tmp_path, 30, every=13)
    resumed = fit(data_of(shards, num_workers=2), tmp_path, 30, tmp_path / "step=13.ckpt")
    assert resumed.keys == whole.keys[52:]
    assert resumed.shapes == whole.shapes[13:]


def test_another_batch_size_is_another_order(tmp_path):
    shards = write_shards(tmp_path, [19, 30, 11, 20])
    fit(data_of(shards), tmp_path, 13, every=13)
    with pytest.raises(InputError, match=r"batch_size 4.*batch_size 6"):
        fit(data_of(shards, batch_size=6), tmp_path, 30, tmp_path / "step=13.ckpt")
    with pytest.raises(InputError, match="buckets"):
        fit(data_of(shards, bucket_step=4), tmp_path, 30, tmp_path / "step=13.ckpt")
    data = data_of(shards, batch_size=6)
    data.on_change = "warn"
    resumed = fit(data, tmp_path, 20, tmp_path / "step=13.ckpt")  # goes on at a whole batch
    assert len(resumed.keys) == 7 * 6


def test_json_sizes_decide_without_reading_images(tmp_path):
    def change(number, members):
        _, w, h = members["txt"].split()
        return {**members, "json": json.dumps({"width": int(w), "height": int(h)}).encode()}

    (tmp_path / "plain").mkdir()
    (tmp_path / "json").mkdir()
    plain, with_json = (
        data_of(write_shards(tmp_path / name, [19, 30, 11], function))
        for name, function in (("plain", lambda number, members: members), ("json", change))
    )
    for a, b in zip(batches(plain, 20), batches(with_json, 20), strict=True):
        assert a.keys == b.keys
        assert torch.equal(a.images, b.images)
