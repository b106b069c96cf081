"""Low-rank adapters of networks and stages, and which parameters a stage trains."""

import copy

import pytest
import torch
from tiny_stages import SMALL, TEXT_DIM, base_stage, generators, make_batch, sr_stage, text_settings

from imagen_lightning.components import build, class_path
from imagen_lightning.errors import InputError
from imagen_lightning.networks import EfficientUNet, LoRA, PatchTransformer, UNet, lora
from imagen_lightning.stages import BaseStage
from imagen_lightning.text import TransformerEncoder

CAPTIONS = ["a red star", "a dog"]


def patch_stage(**changes):
    torch.manual_seed(0)
    network = PatchTransformer(dim=16, num_layers=2, patch_size=2, bottleneck=8, text_dim=TEXT_DIM, head_dim=8)
    return base_stage(network, **changes)


STAGES = {"unet": base_stage, "efficient": sr_stage, "patch": patch_stage}
ALL = {"unet": ["attention", "convolutions"], "efficient": ["attention", "convolutions"], "patch": ["attention", "*"]}


@pytest.fixture(params=STAGES)
def kind(request):
    return request.param


def filled(stage, deviation=0.2):
    """The stage with an adapter that does something."""
    generator = torch.Generator().manual_seed(3)
    for parameter in lora.adapter_parameters(stage.network):
        parameter.data.normal_(0, deviation, generator=generator)
    return stage


def output(stage, dtype=torch.float32):
    """The network's answer to a batch in training's way, text keys and values from the text itself."""
    stage.eval()
    x0, conditioning = stage.condition(make_batch(range(2)), 0, training=False)
    t = torch.tensor([0.3, 0.8], dtype=dtype)
    with torch.no_grad():
        return stage.predict(x0.to(dtype), t, conditioning.to(dtype))


def draw(stage):
    options = {}
    if stage.network.low_res:
        options["low_res"] = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return stage.sample(CAPTIONS, generators(1, 2), num_steps=2, guidance=2.0, **options)


def test_an_adapter_begins_as_nothing_and_merges_into_the_weights(kind):
    stage = STAGES[kind]()
    before, names = output(stage), set(stage.state_dict())
    stage.attach_adapter(LoRA(4, alpha=6, targets=ALL[kind]))
    torch.testing.assert_close(output(stage), before, atol=1e-6, rtol=0)  # kernels round by their memory's place
    adapted, images = output(filled(stage)), draw(stage)
    assert (adapted - before).abs().max() > 0.05
    stage.merge_adapter()
    assert stage.adapter is None
    assert set(stage.state_dict()) == names
    assert all(parameter.requires_grad for parameter in stage.parameters())
    torch.testing.assert_close(output(stage), adapted, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(draw(stage), images, atol=1e-4, rtol=0)


def test_merging_in_float64_is_the_product_of_the_factors():
    stage = base_stage().double()
    before = {name: value.clone() for name, value in stage.network.state_dict().items()}
    stage.attach_adapter(LoRA(4, alpha=6, targets=["attention", "convolutions"]))
    filled(stage)
    pairs = lora.factors(stage.network)
    assert {each.scale for each in pairs.values()} == {1.5}
    stage.merge_adapter()
    for name, value in stage.network.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer not in pairs:
            assert torch.equal(value, before[name])
        elif value.dim() == 2:
            torch.testing.assert_close(value - before[name], 1.5 * pairs[layer].b @ pairs[layer].a, atol=1e-15, rtol=0)
        else:  # a convolution by A, then one of 1 x 1 by B, of a picture of one pixel that is lit
            x = torch.randn(1, value.shape[1], 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            twice = 1.5 * torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, pairs[layer].a), pairs[layer].b)
            once = torch.nn.functional.conv2d(x, value - before[name])
            torch.testing.assert_close(once, twice, atol=1e-12, rtol=0)


def test_bfloat16_weights_are_merged_in_float32():
    stage = base_stage()
    stage.network.to(torch.bfloat16)
    before = stage.network.mid_attention.to_qkv.weight.detach().clone()
    stage.attach_adapter(LoRA(4))
    assert all(parameter.dtype == torch.float32 for parameter in lora.adapter_parameters(stage.network))
    pair = lora.factors(filled(stage).network)["mid_attention.to_qkv"]
    stage.merge_adapter()
    wanted = (before.double() + (pair.b.double() @ pair.a.double())).float().bfloat16()
    own = stage.network.mid_attention.to_qkv.weight
    assert own.dtype == torch.bfloat16
    assert (own != wanted).float().mean() < 0.01  # float32's own rounding, at a tie of bfloat16


def test_adapters_alone_are_trained(kind):
    text = text_settings(network=TransformerEncoder(TEXT_DIM, TEXT_DIM, num_layers=1, num_heads=2), null_text="learned")
    stage = STAGES[kind](text=text, adapter=LoRA(2), randomized=False)
    stage.training_step(make_batch(range(4)), 0).backward()
    for name, parameter in stage.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert (parameter.grad is not None) == ("lora_" in name)


def test_recomputed_activations_give_the_same_gradients(kind):
    gradients = []
    for again in (False, True):
        stage = STAGES[kind]()
        stage.network.recompute_with(again)
        stage.attach_adapter(LoRA(2, targets=ALL[kind], dropout=0.5))
        filled(stage)
        torch.manual_seed(5)
        stage.train().training_step(make_batch(range(2)), 0).backward()
        gradients.append({name: value.grad for name, value in stage.named_parameters() if value.requires_grad})
    assert all(value.abs().max() > 0 for value in gradients[0].values())
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, atol=1e-6, rtol=1e-5)


def test_the_precomputed_keys_and_values_are_the_adapted_ones(kind):
    stage = STAGES[kind]()
    stage.attach_adapter(LoRA(4, targets=["*text_to_kv"]))
    plain = output(stage)
    filled(stage, 0.5)
    _, conditioning = stage.condition(make_batch(range(2)), 0, training=False)
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        direct = stage.predict(x, t, conditioning)
        through = stage.predict(x, t, stage.network.precompute(conditioning))
    torch.testing.assert_close(through, direct, atol=1e-5, rtol=1e-5)
    assert (output(stage) - plain).abs().max() > 1e-3


@pytest.mark.slow
def test_an_adapted_network_compiles():
    stage = base_stage()
    stage.attach_adapter(LoRA(4, targets=["attention", "convolutions"]))
    wanted = output(filled(stage))
    stage.network.compile(backend="eager")
    torch.testing.assert_close(output(stage), wanted, atol=1e-5, rtol=1e-5)


def test_which_layers():
    unet = UNet(**SMALL, attention=[False, True], text_dim=TEXT_DIM)
    attention = LoRA(targets=["attention"]).layers(unet)
    assert {name.rpartition(".")[2] for name in attention} == {"to_qkv", "text_to_kv", "to_out"}
    assert {name.rpartition(".")[0].partition(".")[0] for name in attention} == {
        "down_attention",
        "mid_attention",
        "up_attention",
    }
    convolutions = LoRA(targets=["convolutions"]).layers(unet)
    assert {"conv_in", "conv_out", "mid_in.conv1", "down_blocks.2.shortcut"} <= set(convolutions)
    assert LoRA(targets=["mid_*.conv?", "conv_in"]).layers(unet) == [
        "conv_in", "mid_in.conv1", "mid_in.conv2", "mid_out.conv1", "mid_out.conv2",
    ]  # fmt: skip
    efficient = EfficientUNet(**SMALL, attention=["none", "self"], text_dim=TEXT_DIM)
    convolutions = LoRA(targets=["convolutions"]).layers(efficient)
    assert "down.0" in convolutions
    assert not [name for name in convolutions if name.startswith("up.")]  # they enlarge their input first


def test_targets_that_match_nothing_are_refused():
    patch = patch_stage().network
    with pytest.raises(InputError, match=r"'convolutions' matches no layer of PatchTransformer"):
        LoRA(targets=["attention", "convolutions"]).layers(patch)
    with pytest.raises(InputError, match=r"'blocks\.\*\.feed_inn' matches no layer .* blocks.0.feed_in"):
        LoRA(targets=["blocks.*.feed_inn"]).layers(patch)
    with pytest.raises(InputError, match=r"'up\.0' is no plain linear layer"):
        LoRA(targets=["up.0"]).layers(sr_stage().network)
    for arguments in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"targets": []}, {"targets": "attention"}):
        with pytest.raises(InputError, match="LoRA"):
            LoRA(**arguments)


def test_a_stage_with_an_adapter_is_rebuilt_from_plain_data():
    stage = base_stage(adapter=LoRA(2, 3.0, ["attention"], 0.1))
    again = build({"class_path": class_path(stage), "init_args": stage.hyperparameters()})
    assert isinstance(again, BaseStage)
    assert vars(again.adapter) == {"rank": 2, "alpha": 3.0, "targets": ["attention"], "dropout": 0.1}
    again.load_state_dict(stage.state_dict())
    assert torch.equal(output(again), output(stage))
    with pytest.raises(InputError, match="an adapter already"):
        stage.attach_adapter(LoRA())
    assert torch.equal(output(copy.deepcopy(stage)), output(stage))  # as the EMA copies it


def test_the_digest_tells_bases_apart_and_adapters_and_precisions_not():
    stage = base_stage()
    digest = lora.weights_digest(stage)
    stage.attach_adapter(LoRA(2))
    assert lora.weights_digest(filled(stage)) == digest == stage.base_digest
    assert lora.weights_digest(base_stage().to(torch.bfloat16)) == digest
    stage.merge_adapter()
    assert lora.weights_digest(stage) != digest
    assert lora.weights_digest(patch_stage()) != digest
