"""What holds for every network."""

from dataclasses import replace

import pytest
import torch

from imagen_lightning.components import build, describe
from imagen_lightning.networks import EfficientUNet, PatchTransformer, UNet
from imagen_lightning.networks.flops import count_flops
from imagen_lightning.types import Conditioning, InputError, Text

TEXT_DIM, LENGTH, SIZE = 6, 5, 8
SMALL = {"dim": 8, "multipliers": [1, 2], "num_blocks": [1, 2], "head_dim": 4, "groups": 4}
BASE = {**SMALL, "attention": [False, True]}
AS_IF = {
    "activation": "gelu",
    "embedding_activations": ["gelu", "gelu"],
    "text_projection": 32,
    "text_norm": "group",
    "text_pooling": "attention",
    "pooling_heads": 3,
    "skip_scale": 0.7,
    "mid_scale": 1.4,
    "out_scale": 1.2,
    "time_dim": 24,
    "head_dim": [8, 4],
}
PATCHES = {"dim": 16, "num_layers": 2, "patch_size": 2, "bottleneck": 6, "head_dim": 8}
EFFICIENT = {**SMALL, "attention": ["none", "self"]}
NETWORKS = {
    "unet": (UNet, {**BASE, "text_dim": TEXT_DIM}),
    "unet patch 2": (UNet, {**BASE, "text_dim": TEXT_DIM, "patch_size": 2}),
    "unet low_res": (UNet, {**BASE, "text_dim": TEXT_DIM, "low_res": True, "attention": [True, True]}),
    "unet no text": (UNet, BASE),
    "unet as IF": (UNet, {**BASE, "text_dim": TEXT_DIM, **AS_IF}),
    "unet as IF low_res": (UNet, {**BASE, "text_dim": TEXT_DIM, "low_res": True, **AS_IF}),
    "efficient": (EfficientUNet, {**EFFICIENT, "text_dim": TEXT_DIM}),
    "efficient cross": (EfficientUNet, {**EFFICIENT, "text_dim": TEXT_DIM, "attention": ["none", "cross"]}),
    "efficient patch 2": (EfficientUNet, {**EFFICIENT, "text_dim": TEXT_DIM, "patch_size": 2}),
    "efficient no text": (EfficientUNet, EFFICIENT),
    "efficient pixel_shuffle": (EfficientUNet, {**EFFICIENT, "upsampling": "pixel_shuffle"}),
    "efficient transposed": (EfficientUNet, {**EFFICIENT, "upsampling": "transposed"}),
    "patches": (PatchTransformer, {**PATCHES, "text_dim": TEXT_DIM}),
    "patches low_res": (PatchTransformer, {**PATCHES, "text_dim": TEXT_DIM, "low_res": True}),
    "patches no text": (PatchTransformer, PATCHES),
}


def make(name, **changes):
    cls, arguments = NETWORKS[name]
    torch.manual_seed(0)
    network = cls(**{**arguments, **changes})
    for parameter in network.parameters():  # layers that begin at zero hide what lies before them
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


def make_inputs(network, size=SIZE, batch=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    height, width = (size, size) if isinstance(size, int) else size
    text = low_res = level = None
    if network.text_dim is not None:
        mask = torch.ones(batch, LENGTH, dtype=torch.bool)
        mask[0, 3:] = False
        text = Text(randn(batch, LENGTH, TEXT_DIM), mask, randn(batch, TEXT_DIM))
    if network.low_res:
        low_res, level = randn(batch, 3, height, width), torch.rand(batch, generator=generator)
    time = 1000 * torch.rand(batch, generator=generator)
    return randn(batch, 3, height, width), time, Conditioning(text, low_res, level)


def rows(conditioning, index):
    text = conditioning.text
    return Conditioning(
        None if text is None else Text(text.states[index], text.mask[index], text.pooled[index]),
        None if conditioning.low_res is None else conditioning.low_res[index],
        None if conditioning.aug_level is None else conditioning.aug_level[index],
    )


def near(first, second):
    return torch.allclose(first, second, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=NETWORKS)
def name(request):
    return request.param


def test_the_gradient_reaches_every_parameter(name):
    network = make(name)
    inputs = make_inputs(network)
    output = network(*inputs)
    assert output.shape == inputs[0].shape
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(9))).sum().backward()
    untouched = [n for n, p in network.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert untouched == []


@torch.no_grad()
def test_a_fresh_network_says_zero(name):
    cls, arguments = NETWORKS[name]
    network = cls(**arguments)
    assert network(*make_inputs(network)).abs().max() == 0


@torch.no_grad()
def test_images_of_a_batch_do_not_mix(name):
    network = make(name)
    x, time, conditioning = make_inputs(network)
    whole = network(x, time, conditioning)
    for index in ([2, 0, 1], [1], [0, 2]):
        assert near(network(x[index], time[index], rows(conditioning, index)), whole[index])


@torch.no_grad()
def test_each_input_matters(name):
    network = make(name)
    x, time, conditioning = make_inputs(network)
    whole = network(x, time, conditioning)

    def differs(*inputs):
        return not near(network(*inputs), whole)

    assert differs(x + 0.5 * torch.randn_like(x), time, conditioning)
    assert differs(x, time + 100, conditioning)
    text = conditioning.text
    if text is not None:
        assert differs(x, time, replace(conditioning, text=replace(text, states=text.states.flip(0))))
        if network.project_text is None:
            assert differs(x, time, replace(conditioning, text=replace(text, pooled=text.pooled.flip(0))))
        assert differs(x, time, replace(conditioning, text=replace(text, mask=None)))
    if conditioning.low_res is not None:
        assert differs(x, time, replace(conditioning, low_res=conditioning.low_res.flip(0)))
        assert differs(x, time, replace(conditioning, aug_level=1 - conditioning.aug_level))


@torch.no_grad()
def test_padding_of_the_text_changes_nothing(name):
    network = make(name)
    x, time, conditioning = make_inputs(network)
    text = conditioning.text
    if text is None:
        return
    whole = network(x, time, conditioning)
    padded = Text(
        torch.cat([text.states, 100 * torch.randn(3, 4, TEXT_DIM)], dim=1),
        torch.cat([text.mask, torch.zeros(3, 4, dtype=torch.bool)], dim=1),
        text.pooled,
    )
    assert near(network(x, time, replace(conditioning, text=padded)), whole)
    other = text.states.clone()  # even where one caption's statistics are taken over all its tokens
    other[0, 3:] = 7.0
    assert near(network(x, time, replace(conditioning, text=replace(text, states=other))), whole)
    every = replace(text, mask=torch.ones_like(text.mask))
    without = replace(text, mask=None)
    assert near(*(network(x, time, replace(conditioning, text=t)) for t in (every, without)))


@torch.no_grad()
def test_precomputed_keys_and_values_give_the_same(name):
    network = make(name)
    x, time, conditioning = make_inputs(network)
    ready = network.precompute(conditioning)
    assert bool(ready.key_values) == (conditioning.text is not None)
    assert torch.equal(network(x, time, ready), network(x, time, conditioning))
    if conditioning.text is not None:  # and are used: the states are read no more
        blank = replace(ready, text=replace(ready.text, states=torch.zeros_like(ready.text.states)))
        assert torch.equal(network(x, time, blank), network(x, time, conditioning))


@torch.no_grad()
def test_channels_last_gives_the_same(name):
    network = make(name)
    x, time, conditioning = make_inputs(network)
    plain = network(x, time, conditioning)
    network.to(memory_format=torch.channels_last)
    assert near(network(x.to(memory_format=torch.channels_last), time, conditioning), plain)


@torch.no_grad()
def test_bf16_autocast_is_close_and_finite(name):
    network = make(name)
    inputs = make_inputs(network)
    plain = network(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        low = network(*inputs).float()
    assert (low - plain).norm() < 0.1 * plain.norm()


@torch.no_grad()
def test_sides_are_multiples_of_the_stride(name):
    network = make(name)
    stride = network.stride
    assert network(*make_inputs(network, (3 * stride, 5 * stride))).shape[-2:] == (3 * stride, 5 * stride)
    with pytest.raises(InputError, match=f"divisible by {stride}"):
        network(*make_inputs(network, (3 * stride, 5 * stride + 1)))


def test_the_network_is_a_component(name):
    network = make(name)
    again = build(describe(network))
    again.load_state_dict(network.state_dict())
    inputs = make_inputs(network)
    with torch.no_grad():
        assert torch.equal(again.eval()(*inputs), network(*inputs))


@torch.no_grad()
def test_without_low_res():
    network = make("efficient", low_res=False)
    x, time, conditioning = make_inputs(network)
    assert network(x, time, conditioning).shape == x.shape
    with pytest.raises(InputError, match="takes no low-resolution image"):
        network(x, time, replace(conditioning, low_res=x))


def test_conditioning_that_does_not_fit():
    network = make("efficient")
    x, time, conditioning = make_inputs(network)
    wide = replace(conditioning.text, states=torch.zeros(3, LENGTH, TEXT_DIM + 1))
    for change, message in [
        ({"text": None}, f"text_dim {TEXT_DIM} but was given no text"),
        ({"text": wide}, f"has {TEXT_DIM + 1} features"),
        ({"low_res": None}, "needs a low-resolution image"),
        ({"low_res": x[..., ::2, ::2]}, "must be enlarged"),
        ({"aug_level": None}, "no aug_level"),
    ]:
        with pytest.raises(InputError, match=message):
            network(x, time, replace(conditioning, **change))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("unet", {"num_blocks": [1, 2, 3]}, "3 entries for 2 levels"),
        ("unet", {"num_blocks": [1, 0]}, "at least 1"),
        ("efficient", {"num_blocks": 0}, "at least 1"),
        ("unet", {"attention": [True]}, "1 entries for 2 levels"),
        ("unet", {"groups": 3}, "groups 3"),
        ("efficient", {"groups": 3}, "groups 3"),
        ("unet", {"head_dim": 5}, "head_dim 5"),
        ("efficient", {"attention": ["none", "all"]}, "'all'"),
        ("efficient", {"attention": ["none"]}, "each of 2 levels"),
        ("efficient no text", {"attention": ["none", "cross"]}, "needs text"),
        ("efficient", {"upsampling": "bilinear"}, "'bilinear' is unknown; use one of nearest"),
        ("efficient", {"recompute": [True]}, r"recompute \[True\] has 1 entries"),
        ("unet", {"head_dim": [4]}, "1 entries for 2 levels"),
        ("unet", {"activation": "relu"}, "'relu' is unknown; use 'silu' or 'gelu'"),
        ("unet", {"embedding_activations": ["tanh"]}, "'tanh' is unknown"),
        ("unet", {"text_norm": "batch"}, "'batch' is unknown; use one of layer, group, none"),
        ("unet", {"text_norm": "group"}, "do not divide the text's 6 features"),
        ("unet", {"text_pooling": "max"}, "'max' is unknown; use one of mean, attention, none"),
        ("unet", {"text_pooling": "attention"}, "pooling_heads 64 do not divide"),
        ("unet", {"multipliers": [1, 1.3]}, "groups 4"),
        ("patches", {"head_dim": 6}, "head_dim 6 must be a multiple of 4"),
        ("patches", {"head_dim": 12}, "divide dim 16"),
    ],
)
def test_arguments_that_do_not_fit(name, change, message):
    cls, arguments = NETWORKS[name]
    with pytest.raises(InputError, match=message):
        cls(**{**arguments, **change})


@torch.no_grad()
def test_levels_have_the_sizes_and_widths_that_the_papers_say():
    sizes = []

    def watch(network):
        def note(module, inputs, output):
            sizes.append(tuple(output.shape[1:3]))

        for name, module in network.named_modules():
            if name.startswith("down_blocks") and name.endswith("conv2"):
                module.register_forward_hook(note)

    network = make("unet", multipliers=[1, 2, 3], num_blocks=1, attention=[False, False, False])
    watch(network)
    network(*make_inputs(network, 16))
    # blocks of each level, and between them those that halve the map
    assert sizes == [(8, 16), (8, 8), (16, 8), (16, 4), (24, 4)]
    sizes.clear()
    network = make("efficient", multipliers=[1, 2, 3], num_blocks=1, attention=["none", "none", "self"])
    watch(network)
    network(*make_inputs(network, 16))
    assert sizes == [(8, 8), (16, 4), (24, 2)]


@torch.no_grad()
def test_the_efficient_unet_scales_its_skips_and_adds_its_stem():
    network, seen = make("efficient no text"), []
    network.up_blocks[1][0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x, time, conditioning = make_inputs(network)
    network(x, time, conditioning)
    lowest, skip = seen[0].chunk(2, dim=1)
    assert torch.allclose(skip * 2**0.5, lowest, atol=1e-6)
    # with nothing coming up from the levels, what is left is the map at full size
    torch.nn.init.zeros_(network.up[0].weight)
    torch.nn.init.zeros_(network.up[0].bias)
    stem = network.conv_in(torch.cat([x, conditioning.low_res], dim=1))
    expected = network.conv_out(torch.nn.functional.silu(network.norm_out(stem)))
    assert near(network(x, time, conditioning), expected)


def gradients_and_kept_bytes(network, inputs, seed=3):
    """A functional of the output, its gradients, and the bytes kept from the forward for the backward pass."""
    network.zero_grad()
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(seed)  # of the dropout
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network(*inputs)
    loss = (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(9))).sum()
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    return {"loss": loss.detach(), **gradients}, sum(kept.values())


@pytest.mark.parametrize("name", ["unet", "unet as IF low_res", "efficient", "patches"])
def test_recomputed_activations_give_the_same_loss_and_gradients_from_less_memory(name):
    plain, again = make(name, dropout=0.3).train(), make(name, dropout=0.3, recompute=True).train()
    inputs = make_inputs(plain, 16)
    (expected, much), (found, little) = (gradients_and_kept_bytes(network, inputs) for network in (plain, again))
    assert expected.keys() == found.keys()
    for key, gradient in expected.items():
        assert torch.equal(found[key], gradient), key
    assert little < 0.5 * much


@pytest.mark.parametrize("name", ["unet", "efficient", "patches"])  # of the last, blocks
def test_levels_are_recomputed_one_by_one(name):
    kept = [gradients_and_kept_bytes(n := make(name, recompute=r).train(), make_inputs(n, 16))[1] for r in LEVELS]
    none, first, last, both = kept
    assert none > max(first, last)
    assert min(first, last) > both


def test_recomputation_is_set_afterwards_too():
    for name in ("unet", "efficient", "patches"):
        made, network = make(name, recompute=[True, False]).train(), make(name).train()
        network.recompute_with([True, False])
        assert describe(network) == describe(made)
        inputs = make_inputs(network, 16)
        assert gradients_and_kept_bytes(network, inputs)[1] == gradients_and_kept_bytes(made, inputs)[1]
        with pytest.raises(InputError, match=r"recompute \[True\] has 1 entries for 2"):
            network.recompute_with([True])


def test_flops_are_counted_without_those_of_recomputation():
    found = [count_flops(n := make("unet", recompute=again), *make_inputs(n)) for again in (False, True)]
    assert found[0] is not None
    assert found[0] == found[1]


LEVELS = ([False, False], [True, False], [False, True], [True, True])


@torch.no_grad()
def test_a_learned_variance_doubles_the_output():
    for name in ("unet", "unet patch 2", "efficient", "efficient patch 2", "patches"):
        network = make(name, out_channels=6)
        inputs = make_inputs(network)
        assert network.out_channels == 6
        assert network(*inputs).shape == (3, 6, SIZE, SIZE)


@torch.no_grad()
def test_the_skips_of_the_unet_are_scaled():
    plain, scaled = make("unet no text"), make("unet no text", skip_scale=0.5)
    for network in (plain, scaled):
        network.seen = []
        network.up_blocks[0].register_forward_pre_hook(lambda m, inputs, n=network: n.seen.append(inputs[0]))
        network(*make_inputs(network))
    (lowest, skip), (same, half) = (network.seen[0].tensor_split([16], dim=1) for network in (plain, scaled))
    assert torch.equal(lowest, same)
    assert torch.equal(half, 0.5 * skip)


@torch.no_grad()
def test_a_patch_may_lie_anywhere_but_knows_its_place():
    network = make("patches no text")
    x, time, conditioning = make_inputs(network)
    moved = network(x.roll(2, dims=-1), time, conditioning)
    assert not near(moved.roll(-2, dims=-1), network(x, time, conditioning))


@pytest.mark.parametrize("name", ["efficient no text", "efficient pixel_shuffle"])
@torch.no_grad()
def test_upsampling_begins_without_a_checkerboard(name):
    """From a flat map each of the two gives 2 x 2 pixels alike, away from the border."""
    cls, arguments = NETWORKS[name]
    up = cls(**arguments).up[1]
    out = up(torch.randn(1, up.in_channels, 1, 1).expand(1, -1, 6, 6))[..., 2:-2, 2:-2]
    assert out.shape[-1] == 8
    assert near(out, out[..., :1, :1].expand_as(out))


@torch.no_grad()
def test_every_upsampling_doubles_the_map_with_the_channels_above():
    for form in ("nearest", "pixel_shuffle", "transposed"):
        network = make("efficient no text", upsampling=form)
        assert network.up[1](torch.randn(1, 16, 3, 5)).shape == (1, 8, 6, 10)
        weights = dict(network.up[1].named_parameters())
        assert weights["weight"].numel() == {"nearest": 9, "pixel_shuffle": 36, "transposed": 16}[form] * 16 * 8
