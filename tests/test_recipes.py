"""Every shipped recipe's optimizer trains, also weights that begin at zero, and resumes bit-exactly."""

import importlib
import io
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.utils._pytree import tree_leaves

from imagen_lightning.stages import Optimization

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
STEPS = 200


def recipes():
    """The settings of optimization of every YAML that has an optimizer, equal ones once."""
    found = {}
    for path in sorted(EXPERIMENTS.rglob("*.yaml")):
        arguments = ((yaml.safe_load(path.read_text()) or {}).get("model") or {}).get("init_args") or {}
        if (settings := arguments.get("optimization")) and "optimizer" in settings:
            found.setdefault(str(settings), pytest.param(settings, id=str(path.relative_to(EXPERIMENTS))))
    return list(found.values())


def optimization_of(settings):
    """The recipe's optimizer and learning-rate schedule, its warm-up compressed to a tenth of the steps."""
    module, _, name = settings["optimizer"]["class_path"].rpartition(".")
    factory = partial(getattr(importlib.import_module(module), name), **settings["optimizer"]["init_args"])
    return Optimization(
        factory, STEPS // 10 if settings.get("warmup_steps") else 0, settings.get("lr_schedule", "constant")
    )


def toy():
    """A network whose last layer begins at zero, as the stages' and the adapters' do."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 4))
    nn.init.normal_(network[0].weight)
    nn.init.zeros_(network[-1].weight)
    nn.init.zeros_(network[-1].bias)
    return network


def train(optimization, stop=STEPS, state=None):
    """Gives the losses, and what a checkpoint holds, after `stop` of the steps from the start or from a state."""
    network, start, losses = toy(), 0, []
    optimizer = optimization.make(network)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(optimization.share_at, total=STEPS))
    if state is not None:
        state = torch.load(io.BytesIO(state), weights_only=True)
        start = state["step"]
        for part, each in (("network", network), ("optimizer", optimizer), ("scheduler", scheduler)):
            each.load_state_dict(state[part])
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(32, 16, generator=generator)
        loss = (network(x) - 0.1 * torch.tanh(x[:, :4])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    file = io.BytesIO()
    parts = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save({"step": stop, **parts}, file)
    return losses, file.getvalue()


def leaves(checkpoint):
    return tree_leaves(torch.load(io.BytesIO(checkpoint), weights_only=True))


def same(one, other):
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def fall(losses):
    """The last losses as a fraction of the first."""
    return sum(losses[-20:]) / sum(losses[:20])


@pytest.mark.parametrize("settings", recipes())
def test_a_recipe_trains_weights_that_begin_at_zero_and_resumes_bit_exactly(settings):
    optimization = optimization_of(settings)
    losses, whole = train(optimization)
    assert fall(losses) < 0.8
    again, resumed = train(optimization, state=train(optimization, stop=STEPS // 2)[1])
    assert again == losses[STEPS // 2 :]
    assert all(map(same, leaves(resumed), leaves(whole)))


def test_the_toy_tells_an_optimizer_that_cannot_train_at_its_rate():
    losses, _ = train(Optimization(partial(torch.optim.Adafactor, lr=1e-4)))
    assert fall(losses) > 0.95
