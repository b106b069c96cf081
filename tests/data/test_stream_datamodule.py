"""Runs on streamed shards: positions, resume, faults, filters, validation."""

import io
import json
import logging
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from fitting import train
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule
from PIL import Image

from imagen_lightning.components import describe_args
from imagen_lightning.data import LaionDataModule, StreamingLaionDataModule
from imagen_lightning.data.skips import Reason
from imagen_lightning.types import InputError


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.keys, self.positions, self.val_keys = [], [], []

    def training_step(self, batch, _):
        numbers = [int(key[-4:]) for key in batch.keys]
        assert batch.images[:, 0].flatten(1).float().mean(1).tolist() == numbers
        assert batch.captions == [f"number {number}" for number in numbers]
        self.keys.extend(batch.keys)
        self.positions.extend(batch.positions.tolist())
        return self.weight * batch.images.float().mean()

    def validation_step(self, batch, _):
        self.val_keys.append([int(key[-4:]) for key in batch.keys])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, folder, steps, resume=None, **settings):
    module = Recorder()
    trainer = train(module, data, folder, steps, resume, **settings)
    return module, trainer


def write_shards(folder, num_shards=4, size=10, change=lambda number, members: members):
    for shard in range(num_shards):
        with tarfile.open(folder / f"train-{shard:03d}.tar", "w") as tar:
            for number in range(shard * size, (shard + 1) * size):
                buffer = io.BytesIO()
                Image.new("RGB", (10, 8), (number, 7, 9)).save(buffer, "PNG")
                members = {"png": buffer.getvalue(), "txt": b"number %d" % number}
                members["json"] = json.dumps({"width": 10 + number, "height": 100}).encode()
                for suffix, data in change(number, members).items():
                    info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return str(folder / "train-*.tar")


def streaming(train, **settings):
    return StreamingLaionDataModule(train, **{"image_size": 8, "batch_size": 4, "shuffle_buffer": 10, **settings})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_positions_are_numbered_as_batches_come(tmp_path, num_workers, caplog):
    data = streaming(write_shards(tmp_path), num_workers=num_workers)
    with caplog.at_level(logging.WARNING):
        module, _ = fit(data, tmp_path, 20, accumulate_grad_batches=2)
    assert module.positions == list(range(160))
    assert data.position == 160
    assert len({key[-4:] for key in module.keys}) == 40
    assert caplog.text.count("shards are streamed: a resumed run goes on at its position with a fresh draw") == 1


def test_a_resumed_run_goes_on_at_its_position_with_other_draws(tmp_path):
    shards = write_shards(tmp_path)
    first, _ = fit(streaming(shards), tmp_path, 10, every=5)
    state = torch.load(tmp_path / "step=5.ckpt", weights_only=True)["StreamingLaionDataModule"]
    assert (state["position"], state["order"]) == (20, {})
    resumed, trainer = fit(streaming(shards, seed=0), tmp_path, 10, resume=tmp_path / "step=5.ckpt")
    assert resumed.positions == list(range(20, 40))
    assert resumed.keys not in (first.keys[:20], first.keys[20:])
    assert trainer.datamodule.position == 40
    assert fit(streaming(shards), tmp_path, 10)[0].keys == first.keys


def test_epochs_cut_by_lightning_draw_anew(tmp_path):
    module, _ = fit(streaming(write_shards(tmp_path)), tmp_path, -1, max_epochs=3, limit_train_batches=5)
    assert module.positions == list(range(60))
    assert len({tuple(module.keys[start : start + 20]) for start in (0, 20, 40)}) == 3


def test_overfitting_repeats_the_first_batches(tmp_path):
    module, _ = fit(streaming(write_shards(tmp_path)), tmp_path, 6, overfit_batches=2)
    assert module.keys == module.keys[:8] * 3


def test_validation_is_of_indexed_shards_in_order(tmp_path):
    (tmp_path / "val").mkdir()
    val = write_shards(tmp_path / "val", 1, 6, lambda n, m: {**m, "png": b"broken"} if n == 2 else m)
    data = streaming(write_shards(tmp_path), val=val, max_skip_share=0.5)
    module, _ = fit(data, tmp_path, 2, limit_val_batches=1.0, val_check_interval=1, num_sanity_val_steps=0)
    assert module.val_keys == [[0, 1, 3], [4, 5]] * 2
    assert data.val_skips.counts == {Reason.UNDECODABLE.value: 1}
    plain = LaionDataModule(val, val, image_size=8, batch_size=4)
    assert [batch.keys for batch in data.val_dataloader()] == [batch.keys for batch in plain.val_dataloader()]


def test_faults_are_counted_and_listed(tmp_path, caplog):
    def spoil(number, members):
        return {**members, "png": b"broken"} if number == 3 else members

    shards = write_shards(tmp_path, change=spoil)
    whole = (tmp_path / "train-003.tar").read_bytes()
    (tmp_path / "train-003.tar").write_bytes(whole[: len(whole) // 2])
    data = streaming(shards, max_skip_share=0.5, num_workers=2)
    with caplog.at_level(logging.WARNING):
        fit(data, tmp_path / "run", 60)
    assert data.train_skips.counts == {Reason.UNDECODABLE.value: 1, Reason.TRUNCATED_SHARD.value: 1}
    listed = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert {(Path(line["shard"]).name, line["key"]) for line in listed} >= {("train-000.tar", "0003")}
    assert len(listed) == 2
    assert "training: 2 samples skipped" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_faults_stop_the_run(tmp_path, num_workers):
    broken = write_shards(tmp_path, change=lambda number, members: {**members, "png": b"broken"})
    with pytest.raises(InputError, match=r"cannot be used.*'undecodable image', such as '00"):
        fit(streaming(broken, num_workers=num_workers), tmp_path, 5)
    few = write_shards(tmp_path, change=lambda n, members: {**members, "png": b"broken"} if n % 5 == 0 else members)
    with pytest.raises(InputError, match=r"cannot be used, more than max_skip_share 0\.05 allows"):
        fit(streaming(few, num_workers=num_workers, batch_size=10), tmp_path, 60)
    with pytest.raises(InputError, match="'unreadable shard', such as pipe:false"):
        fit(streaming("pipe:false", allow_pipe=True, num_workers=num_workers), tmp_path, 5)


def test_commands_need_the_opt_in(tmp_path):
    write_shards(tmp_path)
    command = f"pipe:cat {tmp_path}/train-{{000..003}}.tar"
    with pytest.raises(InputError, match=r"a shell would run this command with your rights.*set allow_pipe: true"):
        fit(streaming(command), tmp_path, 5)
    module, _ = fit(streaming(command, allow_pipe=True, num_workers=1), tmp_path, 20)
    assert len(set(module.keys)) > 30
    assert all(key.startswith("pipe:cat ") for key in module.keys)


def test_a_filter_counts_as_the_stream_goes(tmp_path, caplog, monkeypatch):
    shards = write_shards(
        tmp_path, change=lambda number, members: {**members, "json": b"{}"} if number < 5 else members
    )
    data = streaming(shards, val=shards, filter={"width_min": 30})
    with caplog.at_level(logging.WARNING):
        module, _ = fit(data, tmp_path, 30, limit_val_batches=1.0, val_check_interval=30)
    assert {int(key[-4:]) for key in module.keys} == set(range(20, 40))
    counts = data.filter_counts["train"]
    assert list(counts.removed) == ["width missing", "width_min=30"]
    assert 0 < counts.removed["width missing"] < counts.removed["width_min=30"]
    assert counts.left >= 120
    assert data.filter_counts["val"].removed == {"width missing": 5, "width_min=30": 15}
    assert f"train: filter: {counts}" in caplog.text
    assert not data.train_skips.counts
    monkeypatch.setattr("imagen_lightning.data.stream._MAX_REMOVED", 100)
    with pytest.raises(InputError, match=r"'width_min=1000': 0 of 4.. samples left; removed: .*; widen it"):
        fit(streaming(shards, filter="width_min=1000"), tmp_path, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": "corner"}, "crop 'corner' is unknown"),
        ({"shuffle_buffer": 0}, "shuffle_buffer 0"),
        ({"decode": "slow"}, "decode 'slow' is unknown"),
        ({"filter": "sharp=1"}, "filter 'sharp' is unknown"),
        ({"max_skip_share": 5}, "max_skip_share 5 is not a share"),
    ],
)
def test_it_refuses(settings, message):
    with pytest.raises(InputError, match=message):
        StreamingLaionDataModule("a.tar", **settings)


def test_it_is_a_component_that_a_yaml_names():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=LightningDataModule)
    arguments = {"train": ["pipe:cat a.tar"], "allow_pipe": True, "filter": {"min_side": 64}}
    item = {"class_path": "imagen_lightning.data.StreamingLaionDataModule", "init_args": arguments}
    data = parser.instantiate_classes(parser.parse_object({"data": item})).data
    assert describe_args(data).items() >= arguments.items()
    with pytest.raises(InputError, match="no validation shards"):
        data.validation_set()
    assert data.val_dataloader() == []


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import imagen_lightning.torchvision_mend
from test_stream_datamodule import *

data = streaming({shards!r}, batch_size=8, num_workers=1)
module, trainer = fit(data, {run!r}, 10, devices=2, strategy="ddp")
Path({run!r}, f"{{trainer.global_rank}}.json").write_text(json.dumps([module.positions, module.keys]))
assert data.position == 80
try:
    fit(streaming({shards!r}, batch_size=7), {run!r}, 10, devices=2, strategy="ddp")
except InputError as error:
    assert "all 2 processes" in str(error)
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    script = tmp_path / "script.py"
    shards = write_shards(tmp_path)
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), shards=shards, run=str(tmp_path)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    (first, first_keys), (second, second_keys) = (
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)
    )
    assert sorted(first + second) == list(range(80))
    assert first[:8] == [0, 1, 2, 3, 8, 9, 10, 11]
    assert first_keys != second_keys
