"""Positions, resume and batches of the DataModules, against the uninterrupted run."""

import io
import json
import logging
import os
import signal
import tarfile

import numpy as np
import pytest
import torch
from fitting import train
from given_data import given
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from imagen_lightning.components import describe_args
from imagen_lightning.data.datamodule import LaionDataModule, ShapesDataModule
from imagen_lightning.data.decode import fit as fit_image
from imagen_lightning.data.shards import Shards
from imagen_lightning.data.skips import Reason, Skip, SkipLog, Unusable
from imagen_lightning.types import InputError


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.keys, self.val_keys = [], []

    def training_step(self, batch, _):
        self.keys.extend(batch.keys)
        self.positions = batch.positions
        return self.weight * batch.images.float().mean()

    def validation_step(self, batch, _):
        self.val_keys.append(list(batch.keys))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, folder, steps, resume=None, **settings):
    module = Recorder()
    trainer = train(module, data, folder, steps, resume, **settings)
    return module, trainer


def keys_of(numbers):
    return [f"shapes-train-{number:06d}" for number in numbers]


def shapes_data(num_workers=0, batch_size=4):
    return ShapesDataModule(image_size=16, batch_size=batch_size, num_workers=num_workers, num_val=6)


@pytest.mark.parametrize(("first_workers", "second_workers"), [(0, 2), (2, 0), (0, 0)])
def test_resume_goes_on_with_the_next_sample(tmp_path, first_workers, second_workers):
    first, _ = fit(shapes_data(first_workers), tmp_path, 5, every=3)
    assert first.keys == keys_of(range(20))
    resumed, trainer = fit(shapes_data(second_workers), tmp_path, 10, resume=tmp_path / "step=3.ckpt")
    assert resumed.keys == keys_of(range(12, 40))
    assert trainer.datamodule.state_dict()["position"] == 40


def test_iterating_draws_nothing_from_the_global_generator():
    data = shapes_data()
    before = torch.get_rng_state()
    next(iter(data.train_dataloader()))
    next(iter(data.val_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)


def test_signals_to_all_processes_leave_the_workers_at_work():
    batches = iter(shapes_data(num_workers=1).train_dataloader())
    next(batches)
    (worker,) = batches._workers
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(worker.pid, number)
    keys = [key for _ in range(4) for key in next(batches).keys]
    assert keys == keys_of(range(4, 20))
    assert worker.is_alive()


def test_the_position_counts_whole_accumulated_steps(tmp_path):
    first, _ = fit(shapes_data(), tmp_path, 4, every=3, accumulate_grad_batches=2)
    assert first.keys == keys_of(range(32))
    assert torch.load(tmp_path / "step=3.ckpt", weights_only=True)["ShapesDataModule"]["position"] == 24
    resumed, _ = fit(shapes_data(), tmp_path, 5, resume=tmp_path / "step=3.ckpt", accumulate_grad_batches=2)
    assert resumed.keys == keys_of(range(24, 40))


def test_resume_with_another_batch_size(tmp_path):
    fit(shapes_data(), tmp_path, 5, every=5)
    resumed, _ = fit(shapes_data(batch_size=8), tmp_path, 7, resume=tmp_path / "step=5.ckpt")
    assert resumed.keys == keys_of(range(20, 36))


def test_epochs_cut_by_lightning_repeat_nothing(tmp_path):
    settings = {"limit_train_batches": 3, "accumulate_grad_batches": 2, "max_epochs": 3}
    module, trainer = fit(shapes_data(2), tmp_path, -1, **settings)  # 3 epochs of 3 batches, 2 steps each
    assert module.keys == keys_of(range(36))
    assert trainer.datamodule.position == 36
    first, _ = fit(shapes_data(), tmp_path, 5, every=1, limit_train_batches=3)
    resumed, _ = fit(shapes_data(), tmp_path, 9, resume=tmp_path / "step=5.ckpt", limit_train_batches=3)
    assert first.keys + resumed.keys == keys_of(range(36))


def test_a_checkpoint_inside_an_accumulated_step_goes_back_to_its_start(tmp_path):
    class SaveMidStep(Recorder):
        def training_step(self, batch, number):
            if number == 5:
                self.trainer.save_checkpoint(tmp_path / "mid.ckpt")
            return super().training_step(batch, number)

    data = shapes_data()
    trainer = Trainer(
        max_steps=4, accumulate_grad_batches=4, limit_val_batches=0, accelerator="cpu", logger=False, barebones=True
    )
    trainer.fit(SaveMidStep(), datamodule=data)
    assert torch.load(tmp_path / "mid.ckpt", weights_only=True)["ShapesDataModule"]["position"] == 16
    assert data.state_dict()["position"] == 64


def test_validation_is_the_same_each_time_and_leaves_the_position(tmp_path):
    module, trainer = fit(
        shapes_data(), tmp_path, 6, limit_val_batches=1.0, val_check_interval=3, num_sanity_val_steps=1
    )
    expected = [[f"shapes-val-{i:06d}" for i in numbers] for numbers in (range(4), range(4, 6))]
    assert module.val_keys == [expected[0], *expected, *expected]
    assert module.keys == keys_of(range(24))
    assert trainer.datamodule.position == 24


def test_overfitting_repeats_the_first_batches(tmp_path):
    module, _ = fit(shapes_data(), tmp_path, 5, overfit_batches=2)
    assert module.keys == [*keys_of(range(8)), *keys_of(range(8)), *keys_of(range(4))]


def test_a_second_trainer_begins_anew_and_the_same_trainer_goes_on(tmp_path):
    data = shapes_data()
    _, trainer = fit(data, tmp_path, 3)
    trainer.fit_loop.epoch_loop.max_steps = 5
    again = Recorder()
    trainer.fit(again, datamodule=data)
    assert again.keys == keys_of(range(12, 20))
    assert fit(data, tmp_path, 2)[0].keys == keys_of(range(8))


def test_a_loader_begun_before_the_position_was_loaded_is_caught(tmp_path):
    class LatePosition(ShapesDataModule):
        def setup(self, stage):
            self.late = True

        def on_before_batch_transfer(self, batch, dataloader_idx):
            if self.late:
                self.load_state_dict({"position": 12})
                self.late = False
            return super().on_before_batch_transfer(batch, dataloader_idx)

    with pytest.raises(RuntimeError, match="gave position 0 where the run is at 12"):
        fit(LatePosition(16, 4), tmp_path, 2)


def test_shapes_batch():
    batch = next(iter(shapes_data().train_dataloader()))
    assert batch.images.shape == (4, 3, 16, 16)
    assert batch.images.dtype == torch.uint8
    assert batch.positions.tolist() == [0, 1, 2, 3]
    whole = next(iter(ShapesDataModule(64, 4).train_dataloader()))
    assert batch.captions == whole.captions
    means = whole.images.float().reshape(4, 3, 16, 4, 16, 4).mean((3, 5))
    assert (batch.images - means).abs().max() <= 0.5


def test_shapes_refuse_other_sizes():
    with pytest.raises(InputError, match="image_size 128"):
        ShapesDataModule(image_size=128)


def picture(number, size=(10, 8), format_="PNG"):
    """A picture from whose pixels the number can be read."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (number, 7, 9)).save(buffer, format_, lossless=True)
    return buffer.getvalue()


def write_shards(folder, sizes, change=lambda number, members: members):
    """Shards whose sample `number` shows it as a red value and says it in its caption."""
    number = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"train-{shard:03d}.tar", "w") as tar:
            for _ in range(size):
                members = {"png": picture(number), "txt": b"number %d" % number}
                for suffix, data in change(number, members).items():
                    info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                number += 1
    return str(folder / "train-*.tar")


def test_images_captions_and_keys_belong_together(tmp_path):
    data = LaionDataModule(write_shards(tmp_path, [9, 14, 5, 11]), image_size=8, batch_size=4, window=2)
    loader = iter(data.train_dataloader())
    batches = [next(loader) for _ in range(39)]  # four epochs
    numbers = torch.cat([batch.images[:, 0].flatten(1).float().mean(1) for batch in batches]).int().tolist()
    assert [caption for batch in batches for caption in batch.captions] == [f"number {n}" for n in numbers]
    assert [key[-4:] for batch in batches for key in batch.keys] == [f"{n:04d}" for n in numbers]
    assert torch.cat([batch.positions for batch in batches]).tolist() == list(range(156))
    for epoch in range(4):
        assert sorted(numbers[39 * epoch : 39 * (epoch + 1)]) == list(range(39))
    assert numbers[:39] != numbers[39:78]
    assert batches[0].images.shape == (4, 3, 8, 8)


@pytest.mark.parametrize(("first_workers", "second_workers"), [(0, 2), (3, 0)])
def test_laion_resume_goes_on_with_the_next_sample(tmp_path, first_workers, second_workers):
    def break_some(number, members):
        return {**members, "png": b"broken"} if number % 13 == 0 else members

    shards = write_shards(tmp_path, [9, 14, 5, 11], break_some)
    settings = {"image_size": 8, "batch_size": 4, "max_skip_share": 0.5, "crop": "random", "random_flip": True}
    whole, _ = fit(LaionDataModule(shards, **settings), tmp_path, 15)
    fit(LaionDataModule(shards, num_workers=first_workers, **settings), tmp_path, 9, every=7)
    resumed, _ = fit(
        LaionDataModule(shards, num_workers=second_workers, **settings), tmp_path, 15, tmp_path / "step=7.ckpt"
    )
    assert len(whole.keys) == 60
    assert resumed.keys == whole.keys[28:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unusable_samples_are_replaced_counted_and_listed(tmp_path, num_workers, caplog):
    wrong = {
        3: ({"png": b"broken"}, Reason.UNDECODABLE),
        5: ({"txt": b"caf\xe9"}, Reason.CAPTION_NOT_UTF8),
        8: ({"txt": b""}, Reason.NO_CAPTION),
        11: ({"png": picture(11, (7, 20))}, Reason.TOO_SMALL),
        14: ({"png": None}, Reason.NO_IMAGE),
        17: ({"txt": None}, Reason.NO_CAPTION),
    }

    def spoil(number, members):
        members = {**members, **wrong.get(number, ({}, None))[0]}
        return {suffix: data for suffix, data in members.items() if data is not None}

    shards = write_shards(tmp_path, [40, 40], spoil)
    run = tmp_path / "run"
    data = LaionDataModule(shards, image_size=8, batch_size=4, num_workers=num_workers, max_skip_share=0.1)
    with caplog.at_level(logging.WARNING):
        module, _ = fit(data, run, 40)  # two epochs and more
    assert len(module.keys) == 160
    assert {int(key[-4:]) for key in module.keys} == set(range(80)) - set(wrong)
    listed = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert {int(line["key"]): line["reason"] for line in listed} == {
        n: reason.value for n, (_, reason) in wrong.items()
    }
    assert {line["shard"] for line in listed} == {str(tmp_path / "train-000.tar")}
    assert len(listed) == len(wrong)
    assert data.train_skips.counts[Reason.NO_CAPTION.value] == 2
    assert "6 samples skipped: 2 caption missing" in caplog.text
    fit(LaionDataModule(shards, image_size=8, batch_size=4, max_skip_share=0.1), run, 40)  # lists nothing twice
    assert len((run / "skipped.jsonl").read_text().splitlines()) == len(wrong)


def test_too_many_skips_stop_the_run(tmp_path):
    def spoil(number, members):
        return {**members, "png": b"broken"} if number % 5 == 0 else members

    shards = write_shards(tmp_path, [125, 125], spoil)
    with pytest.raises(
        InputError, match=r"of \d+ samples cannot be used.*for 'undecodable image', such as '0.*train-00"
    ):
        fit(LaionDataModule(shards, image_size=8, batch_size=10), tmp_path, 50)
    fit(LaionDataModule(shards, image_size=8, batch_size=10, max_skip_share=0.4), tmp_path, 50)


def test_skips_are_told_where_an_error_ends_the_run(tmp_path, caplog):
    class Fail(Recorder):
        def training_step(self, batch, number):
            if number == 20:
                raise RuntimeError("the end")
            return super().training_step(batch, number)

    shards = write_shards(tmp_path, [40], lambda n, members: {**members, "png": b"broken"} if n == 3 else members)
    data = LaionDataModule(shards, image_size=8, batch_size=4, max_skip_share=0.1)
    trainer = Trainer(max_steps=30, limit_val_batches=0, accelerator="cpu", barebones=True)
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="the end"):
        trainer.fit(Fail(), datamodule=data)
    assert "training: 1 sample skipped: 1 undecodable image" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_of_broken_images_stop_at_once(tmp_path, num_workers):
    shards = write_shards(tmp_path, [3], lambda number, members: {**members, "png": b"broken"})
    data = LaionDataModule(shards, image_size=8, batch_size=4, num_workers=num_workers, max_skip_share=1)
    with pytest.raises(InputError, match="undecodable image"):
        fit(data, tmp_path, 5)


def test_shards_without_captions_stop_at_setup(tmp_path):
    shards = write_shards(tmp_path, [5], lambda number, members: {"png": members["png"]})
    with pytest.raises(InputError, match=r"5 of 5 samples cannot be used.*'caption missing or empty'"):
        LaionDataModule(shards).setup("fit")
    with pytest.raises(InputError, match="match no file"):
        LaionDataModule(str(tmp_path / "other-*.tar")).setup("fit")


def test_validation_is_in_order_with_a_short_batch_and_leaves_out_what_is_broken(tmp_path):
    shards = write_shards(tmp_path, [7, 8], lambda n, members: {**members, "png": b"broken"} if n == 5 else members)
    data = LaionDataModule(shards, shards, image_size=8, batch_size=4)
    module, _ = fit(data, tmp_path, 2, limit_val_batches=1.0, val_check_interval=1, num_sanity_val_steps=0)
    expected = [[0, 1, 2, 3], [4, 6, 7], [8, 9, 10, 11], [12, 13, 14]]
    assert [[int(key[-4:]) for key in keys] for keys in module.val_keys] == expected * 2
    assert data.val_skips.counts == {"undecodable image": 1}
    few = LaionDataModule(shards, shards, image_size=8, batch_size=4, num_val=3)
    assert [batch.captions for batch in few.val_dataloader()] == [["number 0", "number 10"]]  # the middle one is broken
    fit(LaionDataModule(shards, image_size=8, batch_size=4), tmp_path, 2, limit_val_batches=1.0, val_check_interval=1)


def test_one_of_several_captions_by_seed_and_position(tmp_path):
    def lines(number, members):
        return {**members, "txt": b"a\nb\nc", "json": b'{"all": ["d", "e"]}'}

    shards = write_shards(tmp_path, [30], lines)
    data = LaionDataModule(shards, shards, image_size=8, batch_size=30)
    batch = next(iter(data.train_dataloader()))
    assert set(batch.captions) == {"a", "b", "c"}
    assert batch.captions == next(iter(data.train_dataloader())).captions
    other = LaionDataModule(shards, image_size=8, batch_size=10, num_workers=1)
    assert next(iter(other.train_dataloader())).captions == batch.captions[:10]
    field = LaionDataModule(shards, image_size=8, batch_size=30, caption_field="all")
    assert set(next(iter(field.train_dataloader())).captions) == {"d", "e"}


def test_validation_data_do_not_depend_on_the_seed(tmp_path):
    shards = write_shards(tmp_path, [30], lambda number, members: {**members, "txt": b"a\nb\nc"})
    kinds = (
        lambda seed: ShapesDataModule(16, batch_size=30, seed=seed, num_val=30),
        lambda seed: LaionDataModule(shards, shards, image_size=8, batch_size=30, seed=seed),
    )
    for make in kinds:
        one, other = make(0), make(1)
        first, second = (next(iter(data.val_dataloader())) for data in (one, other))
        assert first.captions == second.captions
        assert torch.equal(first.images, second.images)
        assert next(iter(one.train_dataloader())).captions != next(iter(other.train_dataloader())).captions


def test_random_crop_and_flip(tmp_path):
    ramp = Image.fromarray(np.repeat(np.arange(64, dtype=np.uint8)[None, :, None], 8, 0).repeat(3, 2))
    buffer = io.BytesIO()
    ramp.save(buffer, "PNG")
    shards = write_shards(tmp_path, [64], lambda number, members: {**members, "png": buffer.getvalue()})

    def rows(**settings):
        data = LaionDataModule(shards, shards, image_size=8, batch_size=64, **settings)
        return next(iter(data.train_dataloader())).images[:, 0, 0].int(), next(iter(data.val_dataloader())).images[
            :, 0, 0
        ]

    centre, _ = rows()
    assert (centre == torch.arange(28, 36)).all()
    cropped, validation = rows(crop="random", random_flip=True)
    assert (validation == torch.arange(28, 36)).all()
    assert len(set(cropped.min(1).values.tolist())) > 20
    flipped = cropped[:, 0] > cropped[:, 7]
    assert 16 < flipped.sum() < 48
    assert ((cropped[:, 1:] - cropped[:, :-1]).abs() == 1).all()


def test_jpegs_are_decoded_fast_or_exactly(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 96, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG", quality=95)
    shards = write_shards(tmp_path, [4], lambda number, members: {"jpg": buffer.getvalue(), "txt": b"noise"})

    def images(**settings):
        data = LaionDataModule(shards, shards, image_size=16, batch_size=4, **settings)
        train, val = (next(iter(loader)).images for loader in (data.train_dataloader(), data.val_dataloader()))
        assert torch.equal(train, val)  # validation does as training does
        return train

    exact = fit_image(Image.open(buffer), 16)
    assert torch.equal(images(decode="exact")[0], exact)
    assert not torch.equal(images()[0], exact)
    assert (images()[0].float() - exact.float()).abs().mean() < 8  # of noise; photographs differ by less than 1


def stored(number, encoder="t5", length=None, value=None):
    buffer = io.BytesIO()
    states = np.full((length or number % 3 + 1, 4), number if value is None else value, np.float16)
    np.savez(buffer, states=states, encoder=np.array(encoder))
    return buffer.getvalue()


def test_stored_text_states_reach_the_batch(tmp_path):
    shards = write_shards(tmp_path, [12], lambda n, members: {**members, "text.npz": stored(n)})
    batch = next(iter(LaionDataModule(shards, image_size=8, batch_size=12, text_encoder="t5").train_dataloader()))
    numbers = torch.tensor([int(key[-4:]) for key in batch.keys])
    assert batch.text.states.shape == (12, 3, 4)
    assert torch.equal(batch.text.mask.sum(1), numbers % 3 + 1)
    assert torch.equal(batch.text.pooled, numbers[:, None].expand(-1, 4).float())
    expected = batch.text.mask[..., None] * numbers[:, None, None].float()
    assert torch.equal(batch.text.states, expected.expand(-1, -1, 4))
    with pytest.raises(InputError, match=r"text states of another encoder.*wanted: text_encoder 'umt5'"):
        LaionDataModule(shards, image_size=8, text_encoder="umt5").setup("fit")


def test_wrong_text_states_are_skipped(tmp_path):
    wrong = {2: stored(2, "umt5"), 4: stored(4, value=np.nan), 6: b"PK", 8: None}

    def spoil(number, members):
        states = wrong.get(number, stored(number))
        return members if states is None else {**members, "text.npz": states}

    shards = write_shards(tmp_path, [50], spoil)
    data = LaionDataModule(shards, image_size=8, batch_size=10, max_skip_share=0.1)
    module, _ = fit(data, tmp_path, 10)
    assert set(data.train_skips.counts) == {
        reason.value
        for reason in (Reason.OTHER_ENCODER, Reason.NAN_TEXT_STATES, Reason.BAD_TEXT_STATES, Reason.NO_TEXT_STATES)
    }
    assert not {int(key[-4:]) for key in module.keys} & set(wrong)


def described(number, members):
    fields = {"width": 10 + number, "HEIGHT": 20, "NSFW": ["UNLIKELY", "UNSURE", "?"][number % 3], "LANGUAGE": "en"}
    return {**members, "json": json.dumps({**fields, "caption": ""}).encode()}


@pytest.mark.parametrize("filter_", [{"min_side": 15, "punsafe_max": 0.4}, "min_side=15,punsafe_max=0.4"])
def test_a_filter_leaves_out_samples_and_counts_them(tmp_path, filter_, caplog):
    def spoil(number, members):
        return {**described(number, members), "png": b"broken"} if number == 9 else described(number, members)

    shards = write_shards(tmp_path, [7, 8], spoil)
    data = LaionDataModule(shards, shards, image_size=8, batch_size=3, filter=filter_)
    with caplog.at_level(logging.WARNING):
        module, _ = fit(data, tmp_path, 4, limit_val_batches=1.0, val_check_interval=4)
    left = [6, 9, 12]  # of these 9 is broken
    assert {int(key[-4:]) for key in module.keys} == {int(k[-4:]) for keys in module.val_keys for k in keys} == {6, 12}
    removed = {"width or height missing": 0, "min_side=15": 5, "punsafe missing": 4, "punsafe_max=0.4": 3}
    assert data.filter_counts["train"].removed == data.filter_counts["val"].removed == removed
    assert data.filter_counts["train"].left == len(left)
    assert data.train_skips.counts == {Reason.UNDECODABLE.value: 1}  # what a filter removes is no fault
    assert "train: filter: 3 of 15 samples left; removed: 5 min_side=15, 4 punsafe missing, 3 punsafe_" in caplog.text
    data = LaionDataModule(shards, image_size=8, batch_size=3, filter={"min_side": 256})
    with pytest.raises(InputError, match="'min_side=256': 0 of 15 samples left; removed: 15 min_side=256; widen it"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("given", "filter_"),
    [
        ("{min_side: 256, language: [en, de]}", {"min_side": 256, "language": ["en", "de"]}),
        ("min_side=256,language=en,de", "min_side=256,language=en,de"),
        ("null", None),
    ],
)
def test_a_filter_is_written_in_yaml_as_in_a_command(given, filter_):
    parser = ArgumentParser()
    parser.add_class_arguments(LaionDataModule, "data")
    assert parser.parse_args(["--data.train=a.tar", f"--data.filter={given}"]).data.filter == filter_


def test_metadata_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    shards = write_shards(tmp_path, [5], described)

    def fail(*_):
        raise Unusable(Reason.UNREADABLE_SHARD)

    monkeypatch.setattr(Shards, "_pread", fail)
    with pytest.raises(InputError, match=r"metadata of .*train-000\.tar cannot be read: unreadable shard"):
        LaionDataModule(shards, filter="language=en").setup("fit")


def test_a_filter_on_samples_without_metadata_names_what_is_missing(tmp_path):
    shards = write_shards(tmp_path, [5])
    with pytest.raises(InputError, match="0 of 5 samples left; removed: 5 language missing"):
        LaionDataModule(shards, filter={"language": "en"}).setup("fit")


@pytest.mark.parametrize("name", ["dcss-tiles-32", "fluent-emoji-3d", "flower-photos-128", "coco-mini-permissive"])
def test_real_shards_train(name, tmp_path):
    folder = given(name)
    data = LaionDataModule(
        str(folder / "train-*.tar"),
        str(folder / "heldout-*.tar"),
        image_size=32,
        batch_size=8,
        num_val=2,
        caption_field="captions" if "coco" in name else None,
    )
    module, _ = fit(data, tmp_path, 3, limit_val_batches=1.0, val_check_interval=3)
    assert len(set(module.keys)) == 24
    assert module.val_keys[-1] != module.keys[:2]
    assert not data.train_skips.counts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop": "corner"}, "crop 'corner' is unknown"),
        ({"decode": "slow"}, "decode 'slow' is unknown"),
        ({"crop": "bucket", "bucket_step": 24}, "bucket_step 24 must divide image_size 64"),
        ({"image_size": 0}, "image_size 0"),
        ({"num_val": 0}, "num_val 0"),
        ({"max_skip_share": 5}, "max_skip_share 5 is not a share"),
        ({"filter": {"sharp": 1}}, "filter 'sharp' is unknown"),
    ],
)
def test_laion_refuses(arguments, message):
    with pytest.raises(InputError, match=message):
        LaionDataModule("a.tar", **arguments)


def test_datamodules_are_components():
    assert describe_args(LaionDataModule("a.tar"))["train"] == "a.tar"
    assert describe_args(ShapesDataModule(16))["image_size"] == 16


def test_the_share_is_taken_over_the_last_samples():
    skips = SkipLog(max_share=0.1, recent=100, at_least=50)
    broken = [Skip("a.tar", str(number), Reason.BAD_JSON) for number in range(12)]
    skips.record(0, broken[:1])
    skips.record(1000, [])
    skips.record(0, broken[:10])  # ten of the last hundred: at the limit, not above it
    skips.record(95, [])
    skips.record(1, broken[:1])
    assert skips.counts == {"bad JSON": 10}
    with pytest.raises(
        InputError, match=r"11 of 100 samples cannot be used, more than max_skip_share 0.1 allows; 11 for"
    ):
        skips.record(0, broken[:10])


def test_the_log_speaks_at_powers_of_ten(caplog):
    skips = SkipLog(1.0)
    skips.record(1000, [Skip("a.tar", str(number), Reason.BAD_JSON) for number in range(150)])
    assert len(caplog.records) == 3
