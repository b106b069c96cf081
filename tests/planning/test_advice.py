"""The cheapest settings that fit, each checked by a plan of its own."""

from dataclasses import replace

import pytest

from imagen_lightning.planning import advice as module
from imagen_lightning.planning import cheapest, fits, make_plan


def typed(training):
    return (f"batch {training.batch_size} x {training.accumulate}",)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The stages here are of megabytes: no gigabyte is left aside."""
    monkeypatch.setattr(module, "FIXED", 0)


def test_a_smaller_batch_comes_before_what_changes_training(train):
    training = train(batch_size=32)
    whole, half = (make_plan(replace(training, batch_size=size)).peak for size in (32, 16))
    levers = [module.recompute_changes(training, "recompute"), module.eight_bit_changes(training)]
    found = cheapest(training, module.ROOM * (whole + half) / 2, levers, typed)
    assert found.overrides == ("batch 16 x 2",)
    assert found.plan.peak < (whole + half) / 2
    assert found.plan.flops == pytest.approx(make_plan(training).flops, rel=1e-3)


def test_recomputation_comes_where_one_image_is_too_much(train):
    training = train(batch_size=1)
    peak = make_plan(training).peak
    levers = [module.recompute_changes(training, "recompute")]
    found = cheapest(training, module.ROOM * (peak - 100_000), levers, typed)
    assert found.overrides == ("--recompute=[true,false]",)
    assert fits(found.plan.peak, module.ROOM * (peak - 100_000))


@pytest.mark.slow
def test_all_levers_together_and_then_none(train):
    training = train("efficient", batch_size=4)
    plan = make_plan(training)
    levers = [
        module.average_changes(training),
        module.recompute_changes(training, "recompute"),
        module.eight_bit_changes(training),
        module.crop_changes(training, smallest=16),
        module.adapter_changes(training),
    ]
    memory = module.ROOM * 3.6 * plan.weights  # less than weights, gradients and AdamW's state
    found = cheapest(training, memory, levers, typed)
    assert found is not None
    assert any("adapter" in override or "AdamW8bit" in override for override in found.overrides)
    assert fits(found.plan.peak, memory)
    assert cheapest(training, 0.5 * plan.weights, levers, typed) is None


def test_what_is_set_already_is_not_advised(train):
    training = train(recompute=True, average_on_device=False)
    training.stage.attach_adapter(module.LoRA(rank=1))
    assert module.recompute_changes(training, "recompute") == []
    assert module.average_changes(training) == []
    assert module.adapter_changes(training) == []
    assert module.crop_changes(training) == []
    assert module.encoder_changes(replace(training, encoder_on_device=False), ("x",)) == []
