"""The average against its definition, what checkpoints hold of it, resume, and the averaged-weights context."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule

from imagen_lightning.callbacks import EMA, Checkpoint, averaged_weights
from imagen_lightning.text import TinyTextEncoder
from imagen_lightning.types import InputError


class Watch(Callback):
    """Keeps the weights after each step and what validation saw."""

    def __init__(self):
        self.weights, self.in_validation, self.module_saved = [], [], None

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights.append(weights_of(pl_module))

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.in_validation.append(weights_of(pl_module))


def weights_of(module):
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance or {"rtol": 0, "atol": 0}))


def expected_average(weights, decay):
    average = weights[0]
    for n, new in enumerate(weights[1:], start=1):
        d = min(decay, (1 + n) / (10 + n))
        average = {name: d * average[name] + (1 - d) * new[name] for name in new}
    return average


class Float64(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 7, dtype=torch.float64))

    def training_step(self, batch, _):
        return (self.weight * batch.images.double().mean() / 255 - self.weight.detach().sin()).square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("decay", [0.9999, 0.2])
def test_average_is_that_of_the_definition(fit, decay):
    ema, watch = EMA(decay), Watch()
    stage, _ = fit([ema, watch], steps=5, stage=Float64())
    expected = expected_average(watch.weights, decay)
    same(weights_of(stage), expected, rtol=1e-14, atol=1e-15)
    assert (expected["weight"] - watch.weights[-1]["weight"]).abs().max() > 1e-3


def test_checkpoints_hold_both_whenever_they_are_saved(fit, tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "training.ckpt")

        def on_validation_batch_end(self, trainer, pl_module, *_):
            trainer.save_checkpoint(tmp_path / "validation.ckpt")

    watch = Watch()
    settings = {"limit_val_batches": 1, "val_check_interval": 3, "check_val_every_n_epoch": None}
    stage, made = fit([EMA(), watch, Save()], steps=3, num_sanity_val_steps=0, **settings)
    made.save_checkpoint(tmp_path / "after.ckpt")
    average = expected_average(watch.weights, 0.9999)
    for name in ("training", "validation", "after"):
        checkpoint = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        same(checkpoint["state_dict"], average, rtol=1e-4, atol=1e-6)
        same(checkpoint["current_model_state"], watch.weights[-1])
    assert len(watch.in_validation) == 1
    same(watch.in_validation[0], average, rtol=1e-4, atol=1e-6)
    same(weights_of(stage), average, rtol=1e-4, atol=1e-6)
    made.validate(stage, datamodule=made.datamodule, verbose=False)
    same(watch.in_validation[1], watch.in_validation[0])


def test_resumed_average_is_exact(fit, tmp_path):
    whole, _ = fit([EMA(), Checkpoint(every_n_steps=2)], steps=5, folder=tmp_path / "whole")
    fit([EMA(), Checkpoint()], steps=2, folder=tmp_path / "parts")
    resumed, _ = fit([EMA()], steps=5, resume=tmp_path / "parts/checkpoints/last.ckpt")
    same(weights_of(resumed), weights_of(whole))


def test_context_gives_the_average_and_brings_the_weights_back(fit):
    class Use(Callback):
        seen = None

        def on_train_batch_end(self, trainer, pl_module, *_):
            before = weights_of(pl_module)
            with pytest.raises(KeyError):
                self.look(trainer, pl_module)
            same(weights_of(pl_module), before)

        def look(self, trainer, pl_module):
            with averaged_weights(trainer, pl_module) as averaged:
                assert averaged
                self.seen = weights_of(pl_module)
                with averaged_weights(trainer, pl_module):
                    same(weights_of(pl_module), self.seen)
                raise KeyError

    use, watch = Use(), Watch()
    fit([watch, use, EMA()], steps=3)
    same(use.seen, expected_average(watch.weights, 0.9999), rtol=1e-4, atol=1e-6)


def test_context_without_ema_and_inside_validation_moves_nothing(fit):
    class Use(Callback):
        def __init__(self, averaged):
            self.averaged, self.calls = averaged, 0

        def on_validation_batch_end(self, trainer, pl_module, *_):
            before = weights_of(pl_module)
            with averaged_weights(trainer, pl_module) as averaged:
                assert averaged == self.averaged
                same(weights_of(pl_module), before)
            self.calls += 1

    for callbacks in ([EMA(), Use(True)], [Use(False)]):
        fit(callbacks, steps=2, limit_val_batches=1, val_check_interval=2, check_val_every_n_epoch=None)
        assert callbacks[-1].calls >= 1


def test_a_frozen_encoder_is_shared_and_not_saved(fit, make_base, tmp_path):
    class Frozen(TinyTextEncoder):
        def __deepcopy__(self, memo):
            return self

    stage, ema = make_base(), EMA()
    stage.text.encoder = Frozen(16)
    fit([ema, Checkpoint()], steps=1, stage=stage)
    assert ema._average_model.module.text.encoder is stage.text.encoder
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == saved["current_model_state"].keys() == dict(stage.named_parameters()).keys()


def test_an_error_inside_validation_leaves_the_trained_weights(fit, make_base):
    class Fail(Callback):
        def on_validation_batch_end(self, *_):
            raise KeyError("in validation")

    watch, stage = Watch(), make_base()
    settings = {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None}
    with pytest.raises(KeyError):
        fit([EMA(), watch, Fail()], steps=3, stage=stage, num_sanity_val_steps=0, **settings)
    same(weights_of(stage), watch.weights[-1])


def test_refusals(fit):
    with pytest.raises(InputError, match="decay 1"):
        EMA(1.0)
    with pytest.raises(InputError, match="bf16-mixed"):
        fit([EMA()], precision="bf16-true")


def test_an_average_in_main_memory_is_the_same(fit, make_base):
    averages = []
    for device in (None, "cpu"):
        stage, _ = fit([EMA(0.5, device)], steps=3, stage=make_base())
        averages.append([parameter.detach().clone() for parameter in stage.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*averages))
    with pytest.raises(InputError, match="device 'disk' is unknown"):
        EMA(device="disk")


def test_weights_that_are_not_trained_are_their_own_average(fit, make_base):
    stage, ema = make_base(), EMA(0.5)
    stage.network.conv_in.weight.requires_grad_(False)
    before = stage.network.conv_in.weight.detach().clone()

    class Shared(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            average = ema._average_model.module.network
            own = pl_module.network
            assert average.conv_in.weight.data_ptr() == own.conv_in.weight.data_ptr()
            assert average.conv_out.weight.data_ptr() != own.conv_out.weight.data_ptr()

    fit([ema, Shared()], steps=3, stage=stage)
    assert torch.equal(stage.network.conv_in.weight, before)
