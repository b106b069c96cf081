import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D

from imagen_lightning.networks.layers import ResidualBlock, sinusoidal


@pytest.mark.parametrize("resample", ["none", "down", "up"])
@pytest.mark.parametrize("channels", [(8, 8), (8, 12)])
@torch.no_grad()
def test_residual_block_is_diffusers(resample, channels):
    torch.manual_seed(0)
    ours = ResidualBlock(*channels, time_dim=16, resample=resample, groups=4)
    theirs = ResnetBlock2D(
        in_channels=channels[0],
        out_channels=channels[1],
        temb_channels=16,
        groups=4,
        eps=1e-5,
        time_embedding_norm="scale_shift",
        up=resample == "up",
        down=resample == "down",
    )
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    names = {"time": "time_emb_proj", "shortcut": "conv_shortcut"}
    weights = {}
    for name, value in ours.state_dict().items():
        module, parameter = name.split(".")
        weights[f"{names.get(module, module)}.{parameter}"] = value
    theirs.load_state_dict(weights)
    x, embedding = torch.randn(2, channels[0], 6, 4), torch.randn(2, 16)
    result = ours(x, torch.nn.functional.silu(embedding))
    assert result.shape[-1] == {"none": 4, "down": 2, "up": 8}[resample]
    assert torch.allclose(result, theirs(x, embedding), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_residual_block_begins_as_its_shortcut():
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(ResidualBlock(8, 8, 16, groups=4)(x, torch.randn(2, 16)), x)


def test_dropout_drops_in_training_alone():
    block = ResidualBlock(8, 8, 16, groups=4, dropout=0.5)
    torch.nn.init.normal_(block.conv2.weight)
    x, embedding = torch.randn(1, 8, 4, 4), torch.randn(1, 16)
    assert not torch.equal(block(x, embedding), block(x, embedding))
    block.eval()
    assert torch.equal(block(x, embedding), block(x, embedding))


def test_sinusoidal_is_diffusers():
    times = torch.tensor([0.0, 0.4, 17.0, 999.0, 1000.0])
    expected = get_timestep_embedding(times, 16, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.allclose(sinusoidal(times, 16), expected, atol=1e-6)
