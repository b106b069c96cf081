"""What holds for the training and validation of both stages."""

import json

import pytest
import torch
from tiny_stages import TEXT_DIM, base_stage, make_batch, sr_stage, text_settings

from imagen_lightning.components import build
from imagen_lightning.diffusion import CosineSchedule, Epsilon, MinSNR, ShiftedCosineSchedule, V
from imagen_lightning.diffusion.random import Stream, normal, spread_uniform
from imagen_lightning.images import to_float
from imagen_lightning.networks import UNet
from imagen_lightning.stages import BaseStage, Diffusion, Execution, Sampling
from imagen_lightning.text import TinyTextEncoder, TransformerEncoder
from imagen_lightning.types import InputError

STAGES = {"base": base_stage, "sr": sr_stage, "sr crops": lambda **changes: sr_stage(**{"crop_size": 4, **changes})}


@pytest.fixture(params=STAGES)
def make(request):
    return STAGES[request.param]


def losses(stage, batch, training=True):
    with torch.no_grad():
        stage.training_step(batch, 0) if training else stage.validation_step(batch, 0)
    return stage.record.losses


def test_a_step_is_a_function_of_seed_and_positions(make):
    batch = make_batch(range(4))
    first = losses(make(text=text_settings(drop=0.5)), batch)
    torch.manual_seed(123)
    torch.rand(7)
    assert torch.equal(losses(make(text=text_settings(drop=0.5)), batch), first)
    assert not torch.allclose(losses(make(text=text_settings(drop=0.5), seed=1), batch), first)
    batch.positions = batch.positions + 1
    assert not torch.allclose(losses(make(text=text_settings(drop=0.5)), batch), first)


def test_losses_do_not_depend_on_the_batch(make):
    stage = make(text=text_settings(drop=0.5))
    positions = [0, 1, 2, 3, 4, 5, 2**33]
    whole = losses(stage, make_batch(positions))
    record = stage.record
    assert record.keys == [f"key {p}" for p in positions]
    assert whole.shape == record.times.shape == (7,)
    parts = torch.cat([losses(stage, make_batch(part)) for part in (positions[:1], positions[1:3], positions[3:])])
    assert torch.allclose(parts, whole, rtol=1e-4, atol=1e-5)
    assert whole.std() > 1e-3
    with torch.no_grad():
        assert torch.allclose(stage.training_step(make_batch(positions), 0), whole.mean())


def test_validation_does_not_depend_on_the_seed_of_training(make):
    batch = make_batch(range(4))
    stage = make(text=text_settings(drop=1.0), seed=5).eval()
    first = losses(stage, batch, training=False)
    assert torch.equal(losses(make(text=text_settings(drop=0.0), seed=6).eval(), batch, training=False), first)
    assert torch.equal(losses(stage, batch, training=False), first)
    parts = torch.cat([losses(stage, make_batch(part), training=False) for part in ([0, 1, 2], [3])])
    assert torch.allclose(parts, first, rtol=1e-4)


@pytest.mark.parametrize("parametrization", [V(), Epsilon()])
def test_the_loss_by_hand(parametrization):
    # a fresh network says zero: what is left is the mean square of the target
    stage = base_stage(randomized=False, diffusion=Diffusion(parametrization=parametrization, weighting=MinSNR(5.0)))
    batch = make_batch(range(3, 9))
    t = spread_uniform(0, Stream.TIME, batch.positions).double()
    epsilon = normal(0, Stream.NOISE, batch.positions, (3, 8, 8)).double()
    alpha, sigma = torch.cos(t * torch.pi / 2), torch.sin(t * torch.pi / 2)
    snr = (alpha / sigma) ** 2
    if isinstance(parametrization, V):
        target = alpha.view(-1, 1, 1, 1) * epsilon - sigma.view(-1, 1, 1, 1) * to_float(batch.images).double()
        weight = snr.clamp(max=5) / (snr + 1)
    else:
        target, weight = epsilon, snr.clamp(max=5) / snr
    expected = weight * target.square().mean((1, 2, 3))
    assert torch.allclose(losses(stage, batch).double(), expected, rtol=1e-4)
    assert torch.allclose(stage.record.times.double(), t)


def test_the_network_is_told_time_and_text():
    stage, seen = base_stage(), []
    stage.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    batch = make_batch(range(4))
    losses(stage, batch)
    _, time, conditioning = seen[0]
    assert torch.allclose(time, 1000 * stage.record.times)
    text = stage.text.encoder(batch.captions)
    assert torch.equal(conditioning.text.states, text.states)
    assert torch.equal(conditioning.text.mask, text.mask)
    assert torch.equal(conditioning.text.pooled, text.pooled)


def test_stored_text_takes_the_place_of_the_encoder():
    stage, batch = base_stage(), make_batch(range(4))
    whole = losses(stage, batch)
    batch.text = stage.text.encoder(batch.captions)
    batch.captions = ["something else"] * 4
    assert torch.equal(losses(stage, batch), whole)


# ---- text


def dropped(stage, batch):
    return stage.text_of(batch, stage.seed, training=True).states.abs().sum((1, 2)) == 0


def test_captions_are_dropped_one_by_one_at_their_rate():
    positions = range(1, 4001)
    stage = base_stage(text=text_settings(drop=0.1))
    batch = make_batch([1])
    batch.positions, batch.captions = torch.tensor(positions), ["a dog"] * 4000
    where = dropped(stage, batch)
    assert 400 - 4 * 19 < int(where.sum()) < 400 + 4 * 19  # four standard deviations
    assert len(where.nonzero()) != len(set((where.nonzero().flatten() // 10).tolist()))  # not one in each ten
    for part in (slice(0, 7), slice(7, 100)):
        small = make_batch([1])
        small.positions, small.captions = batch.positions[part], batch.captions[part]
        assert torch.equal(dropped(stage, small), where[part])
    assert not torch.equal(dropped(base_stage(text=text_settings(drop=0.1), seed=1), batch), where)
    assert dropped(base_stage(text=text_settings(drop=1.0)), batch).all()
    assert not dropped(base_stage(text=text_settings(drop=0.0)), batch).any()


@pytest.mark.parametrize("null_text", ["zero", "learned", "empty_caption"])
def test_null_texts(null_text):
    stage = base_stage(text=text_settings(drop=1.0, null_text=null_text))
    text = stage.text_of(make_batch(range(4)), 0, training=True)
    expected = {
        "zero": lambda: torch.zeros(TEXT_DIM),
        "learned": lambda: stage.null_embedding,
        "empty_caption": lambda: stage.text.encoder([""]).states[0, 0],
    }[null_text]()
    assert text.mask.sum(1).tolist() == [1] * 4
    assert torch.equal(text.states[:, 0], expected.expand(4, -1))
    assert torch.equal(text.pooled, expected.expand(4, -1))
    assert ("null_embedding" in stage.state_dict()) == (null_text == "learned")
    stage.training_step(make_batch(range(4)), 0).backward()
    if null_text == "learned":
        assert stage.null_embedding.grad.abs().sum() > 0


def test_a_text_network_is_trained_with_its_stage():
    def make():
        torch.manual_seed(3)
        reader = TransformerEncoder(TEXT_DIM, dim=8, num_layers=1, num_heads=2)
        network = UNet(dim=8, multipliers=[1], num_blocks=1, attention=[True], text_dim=8, head_dim=8, groups=4)
        return base_stage(network=network, text=text_settings(network=reader, drop=0.5))

    stage = make()
    stage.training_step(make_batch(range(8)), 0).backward()
    unreached = [name for name, p in stage.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert unreached == []
    names = [name for name in stage.state_dict() if not name.startswith("network.")]
    assert names
    assert all(name.startswith("text_network.") for name in names)
    # captions that are dropped go through it too
    text = stage.text_of(make_batch(range(8)), 0, training=True)
    where = stage.text_of(make_batch(range(8)), 0, training=True).mask.sum(1) == 1
    assert where.any()
    zero = stage.text_network(stage.null(torch.device("cpu")))
    assert torch.allclose(text.pooled[where], zero.pooled.expand(int(where.sum()), -1), atol=1e-6)


def test_an_unconditional_stage():
    from imagen_lightning.stages import TextSettings

    network = UNet(dim=8, multipliers=[1], num_blocks=1, attention=[False], groups=4)
    stage = base_stage(network=network, text=TextSettings())
    assert losses(stage, make_batch(range(2))).isfinite().all()
    images = stage.sample(["", ""], [torch.Generator(), torch.Generator()], num_steps=2)
    assert images.shape == (2, 3, 8, 8)


def test_channels_last_gives_the_same_losses(make):
    batch = make_batch(range(4))
    plain, last = make(), make(execution=Execution(channels_last=True))
    last.load_state_dict(plain.state_dict())
    assert last.network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(losses(last, batch), losses(plain, batch), rtol=1e-4)


# ---- configuration


def test_hyperparameters_rebuild_the_stage(make):
    stage = make(
        diffusion=Diffusion(ShiftedCosineSchedule(128), Epsilon(), MinSNR(3.0)),
        text=text_settings(drop=0.25, null_text="learned"),
        sampling=Sampling(num_steps=7, guidance=2.5),
        seed=11,
    )
    arguments = stage.hyperparameters()
    assert "optimization" not in arguments
    described = json.loads(
        json.dumps({"class_path": f"imagen_lightning.stages.{type(stage).__name__}", "init_args": arguments})
    )
    again = build(described)
    assert again.hyperparameters() == arguments
    again.load_state_dict(stage.state_dict())
    again.log = stage.log
    batch = make_batch(range(4))
    assert torch.equal(losses(again, batch), losses(stage, batch))
    assert again.process.schedule.image_size == 128
    assert again.process.weighting.gamma == 3.0
    assert (again.sampling.num_steps, again.sampling.guidance) == (7, 2.5)


def test_defaults_are_those_of_the_docs():
    stage = BaseStage(8, UNet(dim=8, multipliers=[1], num_blocks=1, attention=[False], groups=4))
    assert type(stage.process.schedule) is CosineSchedule
    assert type(stage.process.parametrization) is V
    assert stage.text.dim is None


def test_parts_that_do_not_fit():
    small = UNet(dim=8, multipliers=[1], num_blocks=1, attention=[False], groups=4)
    with pytest.raises(InputError, match=r"text_dim is None; the text it is given has 12 features"):
        base_stage(network=small)
    with pytest.raises(InputError, match=r"'none' is unknown"):
        text_settings(null_text="none")
    with pytest.raises(InputError, match=r"drop 1\.5"):
        text_settings(drop=1.5)
    with pytest.raises(InputError, match=r"input_dim is 5"):
        text_settings(network=TransformerEncoder(5, dim=8, num_heads=2))
    with pytest.raises(InputError, match="num_steps 0"):
        Sampling(num_steps=0)


def test_the_frozen_encoder_is_no_part_of_the_stage(make):
    class Heavy(TinyTextEncoder):
        def __init__(self):
            super().__init__(TEXT_DIM, max_tokens=8)
            self.model = torch.nn.Linear(3, 3)

    stage = make(text=text_settings(encoder=Heavy()))
    assert all(name.startswith("network.") for name in stage.state_dict())
