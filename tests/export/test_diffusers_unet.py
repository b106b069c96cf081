"""UNet is DeepFloyd IF's U-Net: the same outputs and gradients as diffusers' model with the same weights."""

from functools import cache

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnAddedKVProcessor
from if_shapes import COMMON, FIXTURES, TEXT, blocks

from imagen_lightning.components import build, describe, describe_args
from imagen_lightning.export.diffusers_unet import from_diffusers, names, to_diffusers, unet_arguments, unet_config
from imagen_lightning.networks import UNet
from imagen_lightning.types import Conditioning, InputError, Text

CONFIGS = {
    "tiny stage I": FIXTURES["stage I"],
    "tiny stage II": FIXTURES["stage II"],
    "as IF-I": {
        **COMMON,
        **blocks(1, 3),
        "in_channels": 3,
        "block_out_channels": [32, 64, 96, 128],
        "layers_per_block": 2,
        "cross_attention_dim": 64,
        "encoder_hid_dim": 48,
        "encoder_hid_dim_type": "text_proj",
        "attention_head_dim": 16,
        "addition_embed_type_num_heads": 12,
    },
    "as IF-II": {
        **COMMON,
        **blocks(3, 2),
        "in_channels": 6,
        "block_out_channels": [32, 64, 128, 192, 256],
        "layers_per_block": [2, 2, 3, 1, 2],
        "cross_attention_dim": 32,
        "encoder_hid_dim": 64,
        "attention_head_dim": 32,
        "addition_embed_type_num_heads": 64,
        "class_embed_type": "timestep",
        "resnet_skip_time_act": True,
        "resnet_out_scale_factor": 1.4142271,
        "mid_block_scale_factor": 1.4142271,
        "time_embedding_dim": 80,
        "time_embedding_act_fn": "gelu",
    },
    "other widths, no pooled text, no norms": {
        **COMMON,
        **blocks(0, 3),
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [16, 40, 24],
        "layers_per_block": [1, 2, 1],
        "norm_num_groups": 8,
        "norm_eps": 1e-6,
        "cross_attention_dim": 20,
        "attention_head_dim": [8, 20, 8],
        "act_fn": "silu",
        "resnet_skip_time_act": True,
        "addition_embed_type": None,
        "cross_attention_norm": None,
    },
}
# The published ones, too large to run here.
PUBLISHED = {
    "IF-I-XL": {
        **COMMON,
        **blocks(1, 3),
        "sample_size": 64,
        "in_channels": 3,
        "block_out_channels": [704, 1408, 2112, 2816],
        "layers_per_block": 3,
        "cross_attention_dim": 2816,
        "encoder_hid_dim": 4096,
        "encoder_hid_dim_type": "text_proj",
        "attention_head_dim": 64,
    },
    "IF-II-L": {
        **COMMON,
        **blocks(3, 2),
        "sample_size": 256,
        "in_channels": 6,
        "block_out_channels": [160, 320, 640, 960, 1280],
        "layers_per_block": [2, 2, 3, 5, 5],
        "cross_attention_dim": 1280,
        "encoder_hid_dim": 4096,
        "encoder_hid_dim_type": "text_proj",
        "attention_head_dim": 64,
        "class_embed_type": "timestep",
        "resnet_skip_time_act": True,
        "resnet_out_scale_factor": 1.4142271,
        "mid_block_scale_factor": 1.4142271,
        "time_embedding_dim": 1280,
        "time_embedding_act_fn": "gelu",
    },
}


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


@cache
def theirs(name):
    torch.manual_seed(0)
    model = UNet2DConditionModel(**CONFIGS[name])
    model.set_attn_processor(AttnAddedKVProcessor())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # no norm stays at its identity, no bias at zero
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def ours(name):
    arguments = unet_arguments(CONFIGS[name])
    network = UNet(**arguments)
    network.load_state_dict(from_diffusers(theirs(name).state_dict(), arguments))
    return network.eval(), arguments


def run_both(name, dtype):
    """Outputs and, of a random linear functional of them, gradients by diffusers' names."""
    model, (network, arguments) = theirs(name).to(dtype), ours(name)
    network = network.to(dtype)
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    x, states = randn(2, arguments["channels"], 16, 16), randn(2, 7, arguments["text_dim"])
    times, levels, low_res = torch.tensor([3, 998]), None, None
    if arguments["low_res"]:
        levels, low_res = torch.tensor([250, 999]), randn(*x.shape)
    conditioning = Conditioning(
        Text(states, None, states.mean(dim=1)), low_res, None if levels is None else levels.to(dtype) / 1000
    )
    mine = network(x, times.to(dtype), conditioning)
    joined = x if low_res is None else torch.cat([x, low_res], dim=1)
    other = model(joined, times, encoder_hidden_states=states, class_labels=levels).sample
    functional = randn(*other.shape)
    (mine * functional).sum().backward()
    model.zero_grad()
    (other * functional).sum().backward()
    gradients = to_diffusers({n: p.grad for n, p in network.named_parameters()}, arguments)
    return mine, other, gradients, {n: p.grad for n, p in model.named_parameters()}


def test_outputs_and_gradients_agree(name):
    mine, other, gradients, expected = run_both(name, torch.float32)
    assert mine.shape == other.shape
    assert (mine - other).abs().max() <= 1e-5
    assert gradients.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for key, gradient in expected.items():
        assert (gradients[key] - gradient).abs().max() <= 1e-5 * largest, key
    print(
        f"{name}: outputs of {other.abs().max():.2f} differ by {(mine - other).abs().max():.1e}, gradients of "
        f"{largest:.1f} by {max((gradients[k] - g).abs().max() for k, g in expected.items()):.1e}"
    )


def test_each_tensors_gradient_agrees_in_float64(name):
    mine, other, gradients, expected = run_both(name, torch.float64)
    theirs(name).to(torch.float32)
    assert (mine - other).abs().max() <= 1e-6  # diffusers' softmax stays in float32
    largest = max(gradient.abs().max() for gradient in expected.values())
    for key, gradient in expected.items():  # a key's bias moves no softmax: its gradient is rounding
        assert (gradients[key] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-8 * largest, key


def test_state_dicts_go_to_and_fro_to_the_bit(name):
    arguments, state = unet_arguments(CONFIGS[name]), theirs(name).state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        given = {key: value.to(dtype) for key, value in state.items()}
        back = to_diffusers(from_diffusers(given, arguments), arguments)
        assert back.keys() == given.keys()
        for key, value in given.items():
            assert back[key].dtype == dtype
            assert torch.equal(back[key].view(torch.int8), value.view(torch.int8)), key
            assert back[key].is_contiguous()
    assert len({value.untyped_storage().data_ptr() for value in back.values()}) == len(back)  # safetensors wants it so


@pytest.mark.parametrize("name", [*CONFIGS, *PUBLISHED])
def test_configs_go_to_and_fro(name):
    config = {**CONFIGS, **PUBLISHED}[name]
    arguments = unet_arguments(config)
    written = unet_config(arguments, config.get("sample_size"))
    assert {key: written[key] for key in config if key != "encoder_hid_dim_type"} == {
        key: value for key, value in config.items() if key != "encoder_hid_dim_type"
    }
    assert unet_arguments(written) == arguments
    with torch.device("meta"):
        network, model = UNet(**arguments), UNet2DConditionModel.from_config(written)
        original = UNet2DConditionModel(**config)
    shapes = {key: value.shape for key, value in original.state_dict().items()}
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes
    assert {key: v.shape for key, v in to_diffusers(network.state_dict(), arguments).items()} == shapes
    assert unet_config(describe_args(network), config.get("sample_size")) == written
    assert {key: value for key, value in dict(model.config).items() if written.get(key, value) != value} == {}


def test_published_sizes():
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in UNet(**unet_arguments(config)).parameters())
            for name, config in PUBLISHED.items()
        }
    print(counts)
    assert counts["IF-I-XL"] == pytest.approx(4.3e9, rel=0.02)  # as DeepFloyd's model cards have them
    assert counts["IF-II-L"] == pytest.approx(1.2e9, rel=0.05)


@torch.no_grad()
def test_keys_and_values_once_a_run(name):
    network, arguments = ours(name)
    side = 2 ** (len(CONFIGS[name]["block_out_channels"]) - 1)
    x = torch.randn(2, arguments["channels"], side, side)
    states = torch.randn(2, 5, arguments["text_dim"])
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    level = torch.rand(2) if arguments["low_res"] else None
    for text_mask in (None, mask):
        text = Text(states, text_mask, states.mean(dim=1))
        conditioning = Conditioning(text, x if arguments["low_res"] else None, level)
        ready = network.precompute(conditioning)
        expected = network(x, torch.tensor([5.0, 700.0]), conditioning)
        ready.text.states.mul(0)
        blank = network.precompute(ready)  # a second time changes nothing
        blank.text = Text(torch.zeros_like(states), text_mask, torch.zeros_like(text.pooled))
        assert torch.equal(network(x, torch.tensor([5.0, 700.0]), blank), expected)


def test_the_component_keeps_its_settings(name):
    network, _ = ours(name)
    again = build(describe(network))
    again.load_state_dict(network.state_dict())
    assert describe(again) == describe(network)
    assert again.out_channels == CONFIGS[name]["out_channels"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resnet_time_scale_shift": "default"}, "resnet_time_scale_shift 'default'"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type 'UNetMidBlock2DCrossAttn'"),
        ({"only_cross_attention": True}, "only_cross_attention True"),
        ({"mid_block_only_cross_attention": True}, "mid_block_only_cross_attention True"),
        ({"down_block_types": ["DownBlock2D", TEXT[0]]}, "down_block_types .*ResnetDownsampleBlock2D or"),
        ({"up_block_types": [TEXT[1], TEXT[1]]}, "not the mirror image"),
        ({**blocks(2, 0)}, "last level must attend"),
        ({"cross_attention_norm": "layer_norm"}, "cross_attention_norm 'layer_norm'"),
        ({"cross_attention_dim": [32, 32]}, r"cross_attention_dim \[32, 32\] \(one number\)"),
        ({"encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type 'image_proj'"),
        ({"encoder_hid_dim": None, "encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim None"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type 'text_time'"),
        ({"class_embed_type": "projection"}, "class_embed_type 'projection'"),
        ({"class_embed_type": "timestep"}, r"in_channels 3 \(even"),
        ({"act_fn": "mish"}, "act_fn 'mish'"),
        ({"time_embedding_act_fn": "mish"}, "time_embedding_act_fn 'mish'"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type 'fourier'"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos False"),
        ({"freq_shift": 1}, "freq_shift 1"),
        ({"center_input_sample": True}, "center_input_sample True"),
        ({"conv_in_kernel": 5}, "conv_in_kernel 5"),
        ({"norm_num_groups": None}, "norm_num_groups None"),
        ({"block_out_channels": [32, 64, 96]}, "block_out_channels"),
        ({"num_class_embeds": 4}, "num_class_embeds 4"),
        ({"attention_head_dim": [8, 16]}, r"attention_head_dim \[8, 16\] \(.* both ends"),
        ({"something_new": 1}, "something_new 1"),
    ],
)
def test_configs_that_unet_cannot_be(change, message):
    with pytest.raises(InputError, match=message):
        unet_arguments({**CONFIGS["tiny stage I"], **change})


def test_every_field_of_the_model_is_known():
    fields = set(UNet2DConditionModel(**CONFIGS["tiny stage I"]).config) - {"_use_default_values"}
    unet_arguments({field: value for field, value in theirs("tiny stage I").config.items() if field in fields})
    with pytest.raises(InputError) as error:
        unet_arguments({})
    assert "mid_block_type 'UNetMidBlock2DCrossAttn'" in str(error.value)  # a field left out has the model's default
    assert "down_block_types" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 2}, "patch_size 2"),
        ({"skip_scale": 0.5}, "skip_scale 0.5"),
        ({"text_dim": None}, "text_dim None"),
        ({"text_norm": "layer"}, "text_norm 'layer'"),
        ({"text_pooling": "mean"}, "text_pooling 'mean'"),
        ({"head_dim": [8, 16]}, r"head_dim \[8, 16\] \(.* both ends"),
        ({"attention": [True, False]}, "the last level must attend"),
        ({"embedding_activations": ["gelu", "silu"]}, "embedding_activations"),
        ({"embedding_activations": ["gelu"] * 3}, "embedding_activations"),
        ({"widths": 3}, "no arguments 'widths'"),
    ],
)
def test_networks_that_diffusers_cannot_be(change, message):
    with pytest.raises(InputError, match=message):
        unet_config({**unet_arguments(CONFIGS["tiny stage I"]), **change})


def test_state_dicts_of_another_network_are_refused():
    arguments, state = unet_arguments(CONFIGS["tiny stage I"]), theirs("tiny stage I").state_dict()
    lacking = {key: value for key, value in state.items() if "encoder_hid_proj" not in key}
    with pytest.raises(InputError, match=r"lacks 2 tensors \(encoder_hid_proj.bias, encoder_hid_proj.weight\)"):
        from_diffusers(lacking, arguments)
    with pytest.raises(InputError, match="has unknown 1 tensors"):
        from_diffusers({**state, "position_net.null": torch.zeros(1)}, arguments)
    with pytest.raises(InputError, match="lacks"):
        to_diffusers({}, arguments)
    assert all(len(parts) in (1, 2, 3) for parts in names(arguments).values())
