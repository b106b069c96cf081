"""Stages under Lightning's Trainer, their checkpoints and learning rates."""

import math
from functools import partial
from types import SimpleNamespace

import lightning
import pytest
import torch
from tiny_stages import base_stage, generators, make_batch, sr_stage, text_settings

from imagen_lightning.components import build
from imagen_lightning.data.datamodule import ShapesDataModule
from imagen_lightning.stages import Optimization
from imagen_lightning.types import InputError


def make_trainer(**settings):
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_steps": 2, "limit_val_batches": 0, "num_sanity_val_steps": 0, **settings},
    )


@pytest.fixture(scope="module", params=[base_stage, sr_stage])
def fitted(request, tmp_path_factory):
    """A stage after two steps, its checkpoint's path, and the trainer."""
    optimization = Optimization(partial(torch.optim.AdamW, lr=1e-2), warmup_steps=1)
    stage = request.param(text=text_settings(drop=0.5, null_text="learned"), optimization=optimization, seed=4)
    del stage.log
    before = {name: value.clone() for name, value in stage.state_dict().items()}
    trainer = make_trainer(limit_val_batches=1, val_check_interval=2, check_val_every_n_epoch=None)
    trainer.fit(stage, ShapesDataModule(image_size=8, batch_size=4, num_val=4))
    path = tmp_path_factory.mktemp("fit") / "stage.ckpt"
    trainer.save_checkpoint(path)
    return stage, before, path, trainer


def test_two_steps_train_and_log(fitted):
    stage, before, _, trainer = fitted
    assert trainer.global_step == 2
    assert {"train/loss", "val/loss"} <= set(trainer.callback_metrics)
    assert all(math.isfinite(value) for value in trainer.callback_metrics.values())
    still = [name for name, value in stage.state_dict().items() if torch.equal(value, before[name])]
    assert still == []


def test_the_checkpoint_is_plain_data_from_which_the_stage_is_built(fitted):
    stage, _, path, _ = fitted
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert set(checkpoint["state_dict"]) == set(stage.state_dict())
    arguments = {name: value for name, value in checkpoint["hyper_parameters"].items() if name != "_instantiator"}
    again = build({"class_path": checkpoint["stage_class"], "init_args": arguments})
    assert type(again) is type(stage)
    again.load_state_dict(checkpoint["state_dict"])
    check_same(again, stage)


def test_load_from_checkpoint(fitted):
    stage, _, path, _ = fitted
    again = type(stage).load_from_checkpoint(path)
    check_same(again, stage)
    assert type(stage).load_from_checkpoint(path, seed=9).seed == 9


def check_same(again, stage):
    assert again.hyperparameters() == stage.hyperparameters()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in stage.state_dict().items())
    options = {"low_res": torch.zeros(1, 3, 4, 4)} if hasattr(stage, "low_res_size") else {}
    images = [each.sample(["a dog"], generators(1), num_steps=2, **options) for each in (again, stage)]
    assert torch.equal(*images)


def test_a_run_resumed_is_the_run_unbroken(tmp_path):
    def run(max_steps, resume=None):
        stage = base_stage(
            text=text_settings(drop=0.5), optimization=Optimization(partial(torch.optim.AdamW, lr=1e-2), 3, "cosine")
        )
        trainer = make_trainer(max_steps=max_steps)
        data = ShapesDataModule(image_size=8, batch_size=4)
        if resume is None and max_steps == 4:
            trainer.callbacks.append(SaveAt(2, tmp_path / "half.ckpt"))
        trainer.fit(stage, data, ckpt_path=resume, weights_only=True)
        return stage.state_dict()

    class SaveAt(lightning.Callback):
        def __init__(self, step, path):
            self.step, self.path = step, path

        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == self.step:
                trainer.save_checkpoint(self.path)

    whole = run(4)
    resumed = run(4, resume=tmp_path / "half.ckpt")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


# ---- learning rates


def learning_rates(num_steps, max_steps, **settings):
    stage = base_stage(optimization=Optimization(partial(torch.optim.SGD, lr=0.5), **settings))
    stage.trainer = SimpleNamespace(max_steps=max_steps)
    configured = stage.configure_optimizers()
    assert configured["lr_scheduler"]["interval"] == "step"
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_constant_after_a_linear_warm_up():
    assert learning_rates(6, -1, warmup_steps=4) == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5])
    assert learning_rates(3, -1) == [0.5, 0.5, 0.5]


def test_cosine_after_a_linear_warm_up():
    rates = learning_rates(9, 6, warmup_steps=2, lr_schedule="cosine", final_lr_share=0.2)
    half = [1, 0.5 * (1 + math.sqrt(0.5)), 0.5, 0.5 * (1 - math.sqrt(0.5)), 0, 0, 0]  # cos of 0, 45, 90, ... degrees
    assert rates == pytest.approx([0.25, 0.5, *(0.5 * (0.2 + 0.8 * share) for share in half)])


def test_learning_rates_that_cannot_be():
    for max_steps in (-1, 3):
        with pytest.raises(InputError, match=f"warmup_steps 3, got {max_steps}; raise .*max_steps or lower"):
            learning_rates(1, max_steps, warmup_steps=3, lr_schedule="cosine")
    with pytest.raises(InputError, match="'linear'"):
        Optimization(lr_schedule="linear")
    with pytest.raises(InputError, match="warmup_steps -1"):
        Optimization(warmup_steps=-1)


def test_adafactor_and_any_other_optimizer():
    stage = base_stage(optimization=Optimization(torch.optim.Adafactor))
    stage.trainer = SimpleNamespace(max_steps=10)
    optimizer = stage.configure_optimizers()["optimizer"]
    assert type(optimizer) is torch.optim.Adafactor
    count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert count == sum(p.numel() for p in stage.parameters())


@pytest.mark.parametrize("make", [base_stage, sr_stage])
def test_overfits_one_batch(make):
    stage = make(randomized=False)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-2)
    batch = make_batch(range(4))
    losses = []
    for _ in range(60):
        loss = stage.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
