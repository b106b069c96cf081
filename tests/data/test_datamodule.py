"""Positions, resume and batches of the DataModules, against the uninterrupted run."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from imagen_lightning.data.datamodule import ShapesDataModule
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


def fit(data, folder, steps, resume=None, every=None, **settings):
    module = Recorder()
    callbacks = [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)] if every else []
    trainer = Trainer(
        **{"max_steps": steps, "limit_val_batches": 0, **settings},
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=bool(every),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume)
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
    assert trainer.datamodule.state_dict() == {"position": 40}


def test_the_position_counts_whole_accumulated_steps(tmp_path):
    first, _ = fit(shapes_data(), tmp_path, 4, every=3, accumulate_grad_batches=2)
    assert first.keys == keys_of(range(32))
    assert torch.load(tmp_path / "step=3.ckpt", weights_only=True)["ShapesDataModule"] == {"position": 24}
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
    assert torch.load(tmp_path / "mid.ckpt", weights_only=True)["ShapesDataModule"] == {"position": 16}
    assert data.state_dict() == {"position": 64}


def test_validation_is_the_same_each_time_and_leaves_the_position(tmp_path):
    module, trainer = fit(
        shapes_data(), tmp_path, 6, limit_val_batches=1.0, val_check_interval=3, num_sanity_val_steps=1
    )
    expected = [[f"shapes-val-{i:06d}" for i in numbers] for numbers in (range(4), range(4, 6))]
    assert module.val_keys == [expected[0], *expected, *expected]
    assert module.keys == keys_of(range(24))
    assert trainer.datamodule.position == 24


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
