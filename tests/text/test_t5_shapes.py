"""Published sizes against transformers' own models, which are made without memory."""

import pytest
import torch

from imagen_lightning.text import T5TextEncoder
from imagen_lightning.text.t5_shapes import T5Shape, published_shape
from imagen_lightning.types import InputError


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("google/t5-v1_1-xxl", 4762.3),
        ("google/flan-t5-xl", 1223.5),
        ("t5-small", 35.3),
        ("DeepFloyd/IF-I-XL-v1.0", 4762.3),
    ],
)
def test_the_encoders_are_as_large_as_they_are_known_to_be(name, millions):
    assert published_shape(name).num_parameters / 1e6 == pytest.approx(millions, abs=0.1)


def test_a_shape_of_a_configuration_counts_as_transformers_does():
    transformers = pytest.importorskip("transformers")
    for act in ("relu", "gated-gelu"):
        config = transformers.T5Config(
            d_model=32, d_ff=48, num_layers=3, num_heads=2, d_kv=8, vocab_size=100, feed_forward_proj=act
        )
        with torch.device("meta"):
            model = transformers.T5EncoderModel(config)
        assert T5Shape.of(config).num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_flops_are_two_a_parameter_and_token_and_those_of_attention():
    shape = T5Shape(32, 64, 2, 4, 8)
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    assert shape.flops(10) == 2 * 10 * matrices + 2 * 4 * 10 * 10 * 32


def test_a_published_encoders_width_needs_no_files():
    assert T5TextEncoder("google/t5-v1_1-xxl").dim == 4096
    with pytest.raises(InputError):
        _ = T5TextEncoder("nobody/t5-of-their-own").dim
