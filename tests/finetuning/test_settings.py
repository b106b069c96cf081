"""Which parameters a stage trains, and at which learning rates."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny_stages import TEXT_DIM, base_stage, make_batch, text_settings

from imagen_lightning.errors import InputError
from imagen_lightning.networks import LoRA
from imagen_lightning.stages import Optimization
from imagen_lightning.text import TransformerEncoder


def stage_with(optimization, **changes):
    text = text_settings(network=TransformerEncoder(TEXT_DIM, TEXT_DIM, num_layers=1, num_heads=2))
    return base_stage(text=text, optimization=optimization, **changes)


def trained(stage):
    return {name for name, parameter in stage.named_parameters() if parameter.requires_grad}


def configured(stage, max_steps=10):
    stage.trainer = SimpleNamespace(max_steps=max_steps)
    made = stage.configure_optimizers()
    stage.trainer = None
    return made["optimizer"], made["lr_scheduler"]["scheduler"]


def test_train_and_freeze_by_pattern():
    everything = {name for name, _ in stage_with(Optimization()).named_parameters()}
    assert trained(stage_with(Optimization())) == everything
    attention = {name for name in everything if "attention" in name and name.startswith("network.")}
    stage = stage_with(Optimization(train=["network.*attention*"], freeze=["*.to_out.*"]))
    assert trained(stage) == {name for name in attention if ".to_out." not in name}
    frozen = stage_with(Optimization(freeze=["text_network.*", "network.conv_in.weight"]))
    kept = {name for name in everything if not name.startswith("text_network.") and name != "network.conv_in.weight"}
    assert trained(frozen) == kept


def test_frozen_parameters_have_no_gradients_and_no_optimizer_state():
    stage = stage_with(Optimization(partial(torch.optim.AdamW, lr=0.1), freeze=["text_network.*", "network.down_*"]))
    optimizer, _ = configured(stage)
    before = {name: value.clone() for name, value in stage.state_dict().items()}
    stage.training_step(make_batch(range(4)), 0).backward()
    optimizer.step()
    chosen = trained(stage)
    assert {name for name, parameter in stage.named_parameters() if parameter.grad is not None} == chosen
    assert len(optimizer.state) == len(chosen)
    assert {name for name, value in stage.state_dict().items() if not torch.equal(value, before[name])} == chosen


def test_beside_an_adapter_what_train_names():
    adapter = LoRA(2)
    assert all("lora_" in name for name in trained(stage_with(Optimization(), adapter=adapter)))
    more = trained(stage_with(Optimization(train=["*.lora_*", "text_network.*"]), adapter=adapter))
    assert any("lora_A" in name for name in more)
    assert {name for name in more if "lora_" not in name} == {
        f"text_network.{name}" for name, _ in stage_with(Optimization()).text_network.named_parameters()
    }


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.AdamW, lr=0.5, weight_decay=0.25, fused=True),
        partial(torch.optim.AdamW, lr=0.5, weight_decay=0.25, foreach=True),
        partial(torch.optim.SGD, lr=0.5, weight_decay=0.25, momentum=0.9),
        partial(torch.optim.Adafactor, lr=0.5, weight_decay=0.25),
    ],
)
def test_learning_rates_by_parameter(optimizer):
    scales = {"network.down_blocks.*": 0.1, "network.*": 0.5}
    stage = stage_with(Optimization(optimizer, warmup_steps=2, lr_schedule="cosine", lr_scales=scales))
    made, scheduler = configured(stage)
    names = {id(parameter): name for name, parameter in stage.named_parameters()}
    by_scale = {0.1: "network.down_blocks.", 0.5: "network.", 1.0: "text_network."}
    assert len(made.param_groups) == 3
    assert sum(len(group["params"]) for group in made.param_groups) == len(names)
    for group in made.param_groups:
        scale = group["initial_lr"] / 0.5
        assert all(names[id(parameter)].startswith(by_scale[scale]) for parameter in group["params"])
        assert group["weight_decay"] == 0.25
    stage.training_step(make_batch(range(2)), 0).backward()
    shares = []
    for _ in range(10):
        shares.append([group["lr"] / group["initial_lr"] for group in made.param_groups])
        made.step()
        scheduler.step()
    assert all(max(share) - min(share) < 1e-12 for share in shares)  # warm-up and cosine reach every group
    assert [share[0] for share in shares[:3]] == pytest.approx([0.5, 1.0, 1.0])
    assert shares[-1][0] < 0.05


def test_a_smaller_rate_is_a_smaller_step():
    steps = []
    for scales in ({}, {"network.conv_out.*": 0.25}):
        stage = stage_with(Optimization(partial(torch.optim.SGD, lr=0.1), lr_scales=scales)).double()
        optimizer, _ = configured(stage)
        before = {name: value.clone() for name, value in stage.state_dict().items()}
        x0, conditioning = stage.condition(make_batch(range(2)), 0, training=False)
        output = stage.predict(x0.double(), torch.tensor([0.3, 0.8]).double(), conditioning.to(torch.float64))
        output.square().mean().backward()
        optimizer.step()
        steps.append({name: value - before[name] for name, value in stage.state_dict().items()})
    for name, step in steps[0].items():
        factor = 0.25 if name.startswith("network.conv_out.") else 1.0
        torch.testing.assert_close(steps[1][name], factor * step, atol=1e-15, rtol=1e-9)


def test_patterns_that_match_nothing_are_refused():
    for setting in ("train", "freeze"):
        with pytest.raises(
            InputError, match=rf"optimization.{setting} 'down_blocks\.\*' matches no .* network.down_bl"
        ):
            stage_with(Optimization(**{setting: ["down_blocks.*"]}))
    with pytest.raises(InputError, match=r"lr_scales 'network\.conv_im\.weight' .* network.conv_in.weight"):
        stage_with(Optimization(lr_scales={"network.conv_im.weight": 2.0}))
    with pytest.raises(InputError, match="leave no parameter to train"):
        stage_with(Optimization(freeze=["*"]))
    with pytest.raises(InputError, match="to train none of it, freeze it"):
        Optimization(lr_scales={"*": 0.0})
