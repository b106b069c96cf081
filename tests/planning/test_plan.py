"""What is planned against what a real step takes, by torch's own record of its allocations."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from eight_bits import BlockwiseMomentum, NeedsMemory
from torch import nn
from transformers import Adafactor

from imagen_lightning.networks import LoRA
from imagen_lightning.planning import find_precision, make_plan, show_plan
from imagen_lightning.planning.measure import measure_peak
from imagen_lightning.planning.optimizers import optimizer_memory
from imagen_lightning.types import InputError

TOLERANCE = 0.1  # of the peak: what kernels take for their own work is not planned

PAPERS_ADAFACTOR = partial(Adafactor, lr=1e-4, scale_parameter=False, relative_step=False, warmup_init=False)
CASES = {
    "unet": {},
    "unet, recomputed": {"recompute": True},
    "unet, one level recomputed": {"recompute": [True, False]},
    "unet, dropout": {"dropout": 0.3},
    "unet, Adafactor": {"optimizer": torch.optim.Adafactor},
    "unet, the Adafactor of transformers": {"optimizer": PAPERS_ADAFACTOR},
    "unet, accumulated": {"accumulate": 4},
    "patches": {"name": "patches"},
    "patches in bf16": {"name": "patches", "precision": "bf16-mixed"},
    "patches recomputed in bf16": {"name": "patches", "precision": "bf16-mixed", "recompute": True},
    "efficient": {"name": "efficient"},
    "efficient, cropped": {"name": "efficient", "crop": 32},
}


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_near_a_real_step(train, case):
    planned = make_plan(train(**CASES[case])).peak
    measured = measure_peak(train(**CASES[case], weights=True), torch.device("cpu"))
    print(f"{case}: planned {planned}, measured {measured}, {planned / measured - 1:+.1%}")
    assert abs(planned / measured - 1) < TOLERANCE


def test_parameters_weights_gradients_and_state_are_exact(train):
    training = train()
    plan = make_plan(training)
    count = sum(parameter.numel() for parameter in training.stage.parameters())
    assert plan.total == plan.trained == count
    assert plan.parameters["network"].total == count
    assert plan.weights == plan.average == plan.step.gradients == 4 * count
    tensors = len(list(training.stage.parameters()))
    assert plan.optimizer.state == 8 * count + 4 * tensors  # two moments and a step count
    assert plan.checkpoint == 2 * plan.weights + plan.optimizer.state
    assert "meta device" in plan.optimizer.how
    assert make_plan(replace(training, average_on_device=False)).average == 0
    half = make_plan(replace(training, precision=find_precision("bf16-true")))
    assert half.weights == 2 * count


def test_memory_falls_with_recomputation_crops_and_adapters(train):
    kept = [make_plan(train(recompute=levels)) for levels in (False, [True, False], True)]
    assert kept[0].step.activations > kept[1].step.activations > kept[2].step.activations
    assert kept[0].step.flops < kept[1].step.flops < kept[2].step.flops < 4 / 3 * kept[0].step.flops
    assert kept[0].step.gradients == kept[2].step.gradients
    whole, cropped = (make_plan(train("efficient", crop=crop)) for crop in (None, 32))
    assert cropped.step.activations == pytest.approx(whole.step.activations / 4, rel=0.1)
    adapted = train()
    adapted.stage.attach_adapter(LoRA(rank=2))
    plan = make_plan(adapted)
    trained = plan.parameters["adapter"].total
    assert plan.trained == trained < plan.total / 10
    assert plan.step.gradients == plan.average == 4 * trained
    assert plan.parameters["network"].trained == 0
    assert plan.step.activations < kept[0].step.activations


def test_activations_grow_with_the_batch(train):
    one, two, four = (make_plan(train(batch_size=size)).step.activations for size in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.02)


def test_autocast_keeps_copies_of_the_weights(train):
    plan = make_plan(train("patches", precision="bf16-mixed"))
    assert 0.4 < plan.step.copies / plan.weights < 0.5  # all but norms and what no gradient needs
    assert plan.step.activations < make_plan(train("patches")).step.activations


@pytest.mark.parametrize("cls", [BlockwiseMomentum, NeedsMemory])
def test_any_optimizer_is_measured(train, cls):
    training = train(optimizer=cls)
    sizes = [parameter.numel() for parameter in training.stage.parameters()]
    found = optimizer_memory(training.stage, "cpu")
    expected = cls([nn.Parameter(torch.zeros(1))]).state_bytes(sizes)
    if cls is NeedsMemory:
        assert "real step" in found.how
        assert found.working is None
        assert found.state == pytest.approx(expected, rel=0.01)
    else:
        assert "meta device" in found.how
        assert found.state == expected


def test_an_optimizer_that_fails_is_named(train):
    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("no kernel image")

    with pytest.raises(InputError, match=r"Fails: one step fails \(no kernel image\)"):
        make_plan(train(optimizer=Fails))


def test_a_precision_that_is_not_known_is_refused():
    with pytest.raises(InputError, match="'transformer-engine' cannot be planned"):
        find_precision("transformer-engine")


def test_a_plan_is_shown_and_written(train):
    plan = make_plan(train())
    text = show_plan(plan, measured=plan.peak)
    for word in ("weights", "average (EMA)", "gradients", "optimizer state", "activations", "peak", "FLOP", "+0.0%"):
        assert word in text
    assert json.loads(json.dumps(plan.as_dict()))["peak"] == plan.peak
