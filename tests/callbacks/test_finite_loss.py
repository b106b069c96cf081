"""A batch that makes the loss NaN stops a run with its keys on disk and nothing else touched."""

import dataclasses
import json

import pytest
import torch
from lightning.pytorch import Callback

from imagen_lightning.callbacks import EMA, Checkpoint, FiniteLoss, NonFiniteLossError, find_last
from imagen_lightning.data.datamodule import ShapesDataModule
from imagen_lightning.data.dataset import ShapesDataset


class SpoiledDataset(ShapesDataset):
    def __getitem__(self, position):
        sample = super().__getitem__(position)
        image = sample.image.float()
        if position == 14:
            image[0, 3, 3] = float("nan")
        return dataclasses.replace(sample, image=image)


class SpoiledData(ShapesDataModule):
    def training_set(self):
        return SpoiledDataset(self.seed, "train", self.image_size)


class Weights(Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        self.kept = {name: value.clone() for name, value in pl_module.state_dict().items()}


@pytest.mark.parametrize("kind", ["base", "sr"])
def test_stops_before_the_weights_are_touched(fit, make_base, make_sr, tmp_path, kind):
    stage, weights = make_base() if kind == "base" else make_sr(), Weights()
    callbacks = [EMA(), FiniteLoss(), weights, Checkpoint(every_n_steps=1)]
    with pytest.raises(NonFiniteLossError) as caught:
        fit(callbacks, steps=9, stage=stage, datamodule=SpoiledData(8, 4))
    found = json.loads((tmp_path / "non_finite/step-3.json").read_text())
    assert found["keys"] == [f"shapes-train-{i:06d}" for i in range(12, 16)]
    assert found["positions"] == [12, 13, 14, 15]
    assert found["step"] == 3
    assert found["loss"] == "nan"
    assert [loss == "nan" for loss in found["losses"]] == [False, False, True, False]
    assert found["times"] == pytest.approx(stage.record.times.tolist())
    assert ("aug_levels" in found) == (kind == "sr")
    message = str(caught.value)
    for part in ("'shapes-train-000014'", f"t {found['times'][2]:.4f}", "step-3.json", "step-3.ckpt", "learning rate"):
        assert part in message
    last = torch.load(find_last(tmp_path), weights_only=True)
    assert last["global_step"] == 3
    for name, value in stage.state_dict().items():
        assert torch.equal(value, weights.kept[name])
        assert torch.equal(value, last["current_model_state"][name])


def test_finite_losses_pass(fit, tmp_path):
    _, trainer = fit([FiniteLoss()], steps=2)
    assert trainer.global_step == 2
    assert not (tmp_path / "non_finite").exists()
