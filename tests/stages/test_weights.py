"""The weights of a batch's samples: the objective of DreamBooth, however the step is dealt out."""

import pytest
import torch
from tiny_stages import base_stage, make_batch, sr_stage, text_settings

from imagen_lightning.data.dataset import Sample, collate

STAGES = {"base": base_stage, "sr": sr_stage}


@pytest.fixture(params=STAGES)
def stage(request):
    return STAGES[request.param](text=text_settings(drop=0.3))


def weighted(positions, weights):
    batch = make_batch(positions)
    batch.weights = torch.tensor(weights)
    return batch


def gradient(stage, loss):
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, [*stage.parameters()], allow_unused=True) if g is not None]
    )


def test_no_weights_are_weights_of_one(stage):
    plain = stage.training_step(make_batch(range(4)), 0)
    assert torch.equal(plain, stage.record.losses.mean())
    assert torch.equal(stage.training_step(weighted(range(4), [1.0] * 4), 0), plain)


def test_the_loss_is_the_instance_mean_and_lambda_class_means(stage):
    """Ruiz et al. 2022, eq. 2, with three instance samples to one class sample and lambda = 0.5."""
    share, prior = 0.75, 0.5
    weights = [1 / share, 1 / share, prior / (1 - share), 1 / share]
    loss = stage.training_step(weighted(range(4), weights), 0)
    losses = stage.record.losses
    expected = losses[[0, 1, 3]].mean() + prior * losses[2]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_parts_of_a_step_average_to_the_whole(stage):
    """As accumulated batches and processes do, whatever instance and class samples each has."""
    weights = [2.0, 2.0, 2.0, 0.5, 0.5, 2.0, 0.5, 0.5]
    whole = gradient(stage, stage.training_step(weighted(range(8), weights), 0))
    parts = [gradient(stage, stage.training_step(weighted(range(k, k + 4), weights[k : k + 4]), 0)) for k in (0, 4)]
    assert torch.allclose(sum(parts) / 2, whole, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(parts[0], whole, rtol=1e-2)


def test_validation_leaves_weights_aside(stage):
    stage.validation_step(weighted(range(4), [9.0, 0.0, 1.0, 1.0]), 0)
    total, number = stage.mean_val_loss.totals
    assert torch.equal(total / number, stage.record.losses.double().mean()[None])


def test_collated_weights():
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    samples = [Sample(image, "a", "k", 0, weight=2.0), Sample(None, "", "", 1, weight=5.0), Sample(image, "b", "l", 2)]
    assert collate(samples).weights.tolist() == [2.0, 1.0]
    assert collate(samples[2:]).weights is None
