"""A checkpoint's position is refused where it would mean another sample."""

import io
import logging
import shutil
import tarfile

import pytest
from PIL import Image

from imagen_lightning.data.datamodule import LaionDataModule, ShapesDataModule
from imagen_lightning.data.resume import check_same_order, check_same_step
from imagen_lightning.data.skips import Reason, Skip, SkipLog
from imagen_lightning.types import InputError


def write_shards(folder, sizes):
    folder.mkdir(parents=True)
    number = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"train-{shard:03d}.tar", "w") as tar:
            for _ in range(size):
                picture = io.BytesIO()
                Image.new("RGB", (8, 8), (number, 7, 9)).save(picture, "PNG")
                for suffix, data in (("png", picture.getvalue()), ("txt", b"number %d" % number)):
                    info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                number += 1
    return folder


def test_what_changed_is_named_with_both_values(caplog):
    saved = {"seed": 1, "window": 8, "samples": 100, "shards": "0123456789ab"}
    check_same_order(saved, saved, "refuse")
    check_same_order({}, saved, "refuse")  # a checkpoint from before there was an order in it
    now = {**saved, "seed": 2, "samples": 90, "new": 3}
    with pytest.raises(InputError, match=r"saw data seed 1, 100 samples; the data now has data seed 2, 90 samples: .*"):
        check_same_order(saved, now, "refuse")
    with caplog.at_level(logging.WARNING):
        check_same_order(saved, now, "warn")
    assert "would repeat samples and miss others" in caplog.text
    with pytest.raises(InputError, match="on_change 'ignore' is unknown"):
        check_same_order(saved, now, "ignore")


def test_another_number_of_samples_a_step_is_told(caplog):
    check_same_step(None, 4)
    check_same_step(4, 4)
    assert not caplog.records
    check_same_step(8, 4)
    assert "took 8 samples and takes 4 now" in caplog.text


def test_shards_that_changed_are_refused_and_shards_that_moved_are_not(tmp_path, caplog):
    def data(folder, **settings):
        return LaionDataModule(str(folder), image_size=8, batch_size=4, **settings)

    folder = write_shards(tmp_path / "a", [9, 14, 5])
    saved = data(folder).state_dict()
    assert saved["order"]["samples"] == 28
    moved = tmp_path / "elsewhere" / "b"
    shutil.copytree(folder, moved)
    for same in (data(folder, num_workers=2, crop="random"), data(moved)):
        same.load_state_dict(saved)
    assert not caplog.records
    more = write_shards(tmp_path / "more", [9, 14, 5, 3])
    other_cuts = write_shards(tmp_path / "cuts", [14, 9, 5])
    for changed, words in (
        (data(folder, window=2), "window 8; the data now has window 2"),
        (data(folder, seed=3), "data seed 0; the data now has data seed 3"),
        (data(more), "28 samples, .*the data now has 31 samples"),
        (data(other_cuts), "shards of the names and sizes with hash"),
    ):
        with pytest.raises(InputError, match=words):
            changed.load_state_dict(saved)
        changed.on_change = "warn"
        changed.load_state_dict(saved)
        assert changed.position == saved["position"]


def test_a_line_of_skipped_samples_that_a_kill_tore_is_written_anew(tmp_path):
    path = tmp_path / "skipped.jsonl"
    first = Skip("a.tar", "1", Reason.BAD_JSON)
    skips = SkipLog()
    skips.list_in(path)
    skips.note([first, Skip("a.tar", "2", Reason.UNDECODABLE)])
    whole = path.read_text()
    path.write_text(whole[:-30])
    resumed = SkipLog()
    resumed.list_in(path)
    resumed.note([first, Skip("a.tar", "2", Reason.UNDECODABLE)])
    assert path.read_text() == whole


def test_shapes_are_refused_by_their_seed():
    saved = ShapesDataModule(16).state_dict()
    ShapesDataModule(16, batch_size=8).load_state_dict(saved)
    with pytest.raises(InputError, match="seed 0; the data now has data seed 1"):
        ShapesDataModule(16, seed=1).load_state_dict(saved)
