import math

import pytest
import torch
import torch.nn.functional as F

from imagen_lightning.networks.attention import TextAttention, key_mask
from imagen_lightning.types import InputError

CHANNELS, TEXT_DIM, HEAD_DIM, LENGTH = 12, 5, 4, 6


@pytest.fixture(params=[(True, TEXT_DIM), (False, TEXT_DIM), (True, None)], ids=["self+text", "cross", "self"])
def layer(request):
    to_self, text_dim = request.param
    torch.manual_seed(0)
    layer = TextAttention(CHANNELS, text_dim, HEAD_DIM, groups=3, to_self=to_self).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def direct(layer, x, states, mask):
    """The attention as the formula has it, one image, head and pixel at a time."""
    out = x.clone()
    for b in range(len(x)):
        normed = F.group_norm(x[b : b + 1], 3, layer.norm.weight, layer.norm.bias, layer.norm.eps)[0]
        pixels = normed.reshape(CHANNELS, -1).T
        queries, *own = layer.to_qkv(pixels).split(CHANNELS, dim=1)
        keys, values = [], []
        if states is not None:
            kept = states[b][mask[b]]
            pair = layer.text_to_kv(F.layer_norm(kept, (TEXT_DIM,), layer.text_norm.weight, layer.text_norm.bias))
            keys.append(pair[:, :CHANNELS])
            values.append(pair[:, CHANNELS:])
        if layer.to_self:
            keys.append(own[0])
            values.append(own[1])
        keys, values = torch.cat(keys), torch.cat(values)
        result = torch.zeros_like(queries)
        for head in range(CHANNELS // HEAD_DIM):
            part = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            for i, query in enumerate(queries):
                shares = torch.softmax(keys[:, part] @ query[part] / math.sqrt(HEAD_DIM), dim=0)
                result[i, part] = shares @ values[:, part]
        out[b] += layer.to_out(result).T.reshape(x[b].shape)
    return out


@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_attention_is_softmax_over_text_and_pixels(layer, masked):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, CHANNELS, 2, 3, dtype=torch.float64, generator=generator)
    states = torch.randn(2, LENGTH, TEXT_DIM, dtype=torch.float64, generator=generator)
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    if masked:
        mask[0, 4:] = False
        mask[1, 1] = False
    if layer.text_to_kv is None:
        result, states = layer(x), None
    else:
        result = layer(x, layer.text_key_values(states), key_mask(mask, 6, x.dtype))
    assert torch.allclose(result, direct(layer, x, states, mask), rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_caption_without_tokens_leaves_the_map_finite(layer):
    if layer.text_to_kv is None:
        return
    x = torch.randn(2, CHANNELS, 2, 2, dtype=torch.float64)
    states = torch.randn(2, LENGTH, TEXT_DIM, dtype=torch.float64)
    mask = torch.zeros(2, LENGTH, dtype=torch.bool)
    mask[1] = True
    result = layer(x, layer.text_key_values(states), key_mask(mask, 4, x.dtype))
    assert result.isfinite().all()


def test_key_mask():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    addend = key_mask(mask, 2, torch.float32)
    assert addend.shape == (2, 1, 1, 5)
    assert addend[:, 0, 0].eq(0).tolist() == [[True, True, False, True, True], [True, False, False, True, True]]
    assert torch.isneginf(addend[0, 0, 0, 2])
    assert key_mask(None, 2, torch.float32) is None


def test_attention_begins_as_the_identity():
    x = torch.randn(1, 8, 2, 2)
    assert torch.equal(TextAttention(8, None, 4, 4)(x), x)


def test_refused():
    with pytest.raises(InputError, match="head_dim 5"):
        TextAttention(12, None, 5, 4)
    with pytest.raises(InputError, match="needs text"):
        TextAttention(12, None, 4, 4, to_self=False)
