"""Adapters that diffusers' U-Nets and ours share: the same output with the same file, in both directions."""

import json
import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnAddedKVProcessor
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from imagen_lightning.components import describe
from imagen_lightning.diffusion import DiscreteSchedule, Epsilon, LearnedRange
from imagen_lightning.errors import InputError
from imagen_lightning.export.diffusers_adapter import WEIGHTS, from_tensors, to_files
from imagen_lightning.export.diffusers_unet import from_diffusers, unet_arguments
from imagen_lightning.finetuning import adapters
from imagen_lightning.networks import LoRA, PatchTransformer, UNet, lora
from imagen_lightning.stages import BaseStage, Diffusion, TextSettings
from imagen_lightning.text import TinyTextEncoder
from imagen_lightning.types import Conditioning, Text

CONFIG = {  # stage I of diffusers' own fixtures
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "addition_embed_type": "text",
    "cross_attention_norm": "group_norm",
    "resnet_time_scale_shift": "scale_shift",
    "act_fn": "gelu",
    "out_channels": 6,
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
    "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "sample_size": 32,
    "block_out_channels": [32, 64],
    "cross_attention_dim": 32,
    "encoder_hid_dim": 32,
    "attention_head_dim": 8,
    "addition_embed_type_num_heads": 2,
    "layers_per_block": 1,
    "in_channels": 3,
}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
ARGUMENTS = unet_arguments(CONFIG)


def theirs():
    torch.manual_seed(0)
    model = UNet2DConditionModel(**CONFIG)
    model.set_attn_processor(AttnAddedKVProcessor())
    return model.eval()


def ours(**changes):
    network = UNet(**ARGUMENTS)
    network.load_state_dict(from_diffusers(theirs().state_dict(), ARGUMENTS))
    diffusion = Diffusion(DiscreteSchedule("squaredcos_cap_v2"), Epsilon(), variance=LearnedRange())
    return BaseStage(32, network, TextSettings(TinyTextEncoder(32)), diffusion, **changes).eval()


def outputs(model, network):
    """Of diffusers' model and of ours, in float64."""
    generator = torch.Generator().manual_seed(1)
    x, states = (torch.randn(*shape, generator=generator).double() for shape in ((2, 3, 16, 16), (2, 7, 32)))
    times = torch.tensor([3, 998])
    with torch.no_grad():
        other = model.double()(x, times, encoder_hidden_states=states).sample
        mine = network.double()(x, times.double(), Conditioning(Text(states, None, states.mean(dim=1))))
    return other, mine


def filled(parameters):
    generator = torch.Generator().manual_seed(3)
    for parameter in parameters:
        parameter.data.normal_(0, 0.2, generator=generator)


@pytest.mark.parametrize("alpha", [8.0, 6.0])
@pytest.mark.parametrize("targets", [["attention"], ["attention", "convolutions"]])
def test_diffusers_reads_ours(tmp_path, targets, alpha):
    stage = ours()
    stage.attach_adapter(LoRA(4, alpha, targets))
    filled(lora.adapter_parameters(stage.network))
    adapter = adapters.Adapter(lora.factors(stage.network), adapters.base_identity(stage))
    adapters.save(adapter, tmp_path / "out", "diffusers")
    keys = load_file(tmp_path / "out" / WEIGHTS)
    parts = {re.sub(r"^unet\.mid_block\.attentions\.0\.(.*)\.lora_A\.weight$", r"\1", key) for key in keys}
    assert {*ATTENTION} <= parts
    model = theirs()
    before, _ = outputs(model, stage.network)
    model.load_lora_adapter(tmp_path / "out", prefix="unet", weight_name=WEIGHTS)
    other, mine = outputs(model, stage.network)
    assert (other - before).abs().max() > 0.1
    torch.testing.assert_close(mine, other, atol=2e-6, rtol=0)  # both embed the time in float32


def test_it_comes_back_as_it_was(tmp_path):
    stage = ours()
    stage.attach_adapter(LoRA(4, 8, ["attention", "convolutions"]))
    filled(lora.adapter_parameters(stage.network))
    adapter = adapters.Adapter(lora.factors(stage.network), adapters.base_identity(stage))
    adapters.save(adapter, tmp_path / "out", "diffusers")
    again = adapters.load(tmp_path / "out", ours())
    assert again.layers.keys() == adapter.layers.keys()
    for name, each in adapter.layers.items():
        assert again.layers[name].a.shape == each.a.shape  # three parts that share an A are one adapter again
        assert torch.equal(again.layers[name].delta(), each.delta())
    applied = ours()
    adapters.apply(applied, [(tmp_path / "out", 1.0)])
    stage.merge_adapter()
    assert all(torch.equal(value, applied.state_dict()[name]) for name, value in stage.state_dict().items())


@pytest.mark.parametrize("targets", [ATTENTION, ["to_q", "add_v_proj", "conv1"]])
def test_we_read_what_diffusers_and_peft_trained(tmp_path, targets):
    model = theirs()
    model.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    filled(parameter for parameter in model.parameters() if parameter.requires_grad)
    model.save_lora_adapter(tmp_path / "theirs")
    stage = ours().double()  # each part has an A of its own: the fused adapter has the sum of their ranks
    with pytest.warns(UserWarning, match="does not say which base"):
        adapter = adapters.load(tmp_path / "theirs", stage)
    with pytest.warns(UserWarning, match="does not say which base"):
        adapters.apply(stage, [(tmp_path / "theirs", 1.0)])
    ranks = {name: each.a.shape[0] for name, each in adapter.layers.items()}
    whole = len(targets) == len(ATTENTION)
    assert ranks["mid_attention.to_qkv"] == (9 if whole else 3)
    assert ranks["mid_attention.text_to_kv"] == (6 if whole else 3)
    other, mine = outputs(model, stage.network)
    torch.testing.assert_close(mine, other, atol=2e-6, rtol=0)


def test_old_names_and_alphas_are_read():
    stage = ours()
    place = "unet.mid_block.attentions.0"
    down, up = torch.randn(2, 64), torch.randn(64, 2)
    old = {f"{place}.processor.to_k_lora.down.weight": down, f"{place}.processor.to_k_lora.up.weight": up}
    new = {f"{place}.to_k.lora_A.weight": down, f"{place}.to_k.lora_B.weight": up}
    network = describe(stage.network)
    layers = [from_tensors(tensors, {}, network)["mid_attention.to_qkv"] for tensors in (old, new)]
    assert all(torch.equal(each.delta(), layers[0].delta()) for each in layers)
    assert torch.equal(layers[0].delta()[64:128], up @ down)
    assert layers[0].delta()[:64].abs().max() == layers[0].delta()[128:].abs().max() == 0
    scaled = from_tensors(new | {f"{place}.to_k.alpha": torch.tensor(5.0)}, {}, network)["mid_attention.to_qkv"]
    torch.testing.assert_close(scaled.delta(), 2.5 * layers[0].delta())
    said = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 6, "unet.r": 2, "unet.target_modules": ["to_k"]})}
    torch.testing.assert_close(
        from_tensors(new, said, network)["mid_attention.to_qkv"].delta(), 3.0 * layers[0].delta()
    )


def test_what_does_not_fit_is_refused(tmp_path):
    stage = ours()
    network = describe(stage.network)
    place = "unet.mid_block.attentions.0.to_k"
    pair = {f"{place}.lora_A.weight": torch.zeros(2, 64), f"{place}.lora_B.weight": torch.zeros(64, 2)}
    for tensors, message in (
        ({f"{place}.lora_A.weight": torch.zeros(2, 64)}, "has lora_A and no lora_B"),
        ({key.replace("mid_block", "mid_blok"): value for key, value in pair.items()}, "none of the network's"),
        ({**pair, f"{place}.lora_magnitude_vector": torch.zeros(64)}, "no part of a plain LoRA"),
        ({**pair, "text_encoder.x.lora_A.weight": torch.zeros(2, 64)}, "adapts a text encoder"),
    ):
        with pytest.raises(InputError, match=message):
            from_tensors(tensors, {}, network)
    wide = {key: torch.zeros(2, 65) if "lora_A" in key else value for key, value in pair.items()}
    save_file(wide, tmp_path / WEIGHTS)
    with pytest.warns(UserWarning, match="does not say"), pytest.raises(InputError, match=r"\(192, 65\).*\(192, 64\)"):
        adapters.load(tmp_path / WEIGHTS, stage)
    patch = describe(PatchTransformer(dim=16, num_layers=1, patch_size=2, bottleneck=8, head_dim=8))
    with pytest.raises(InputError, match="diffusers has no such network"):
        to_files({}, patch)
