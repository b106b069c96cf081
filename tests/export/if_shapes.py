"""The shapes of DeepFloyd IF's U-Nets as diffusers' own tests of the pipelines have them."""

PLAIN = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
TEXT = ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D")


def blocks(plain, text):
    """The block types of a U-Net whose first levels do not attend to text."""
    return {
        "down_block_types": [PLAIN[0]] * plain + [TEXT[0]] * text,
        "up_block_types": [TEXT[1]] * text + [PLAIN[1]] * plain,
    }


COMMON = {
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "addition_embed_type": "text",
    "cross_attention_norm": "group_norm",
    "resnet_time_scale_shift": "scale_shift",
    "act_fn": "gelu",
    "out_channels": 6,
}
# What diffusers' own tests of the pipelines use.
FIXTURE = {
    **COMMON,
    **blocks(1, 1),
    "sample_size": 32,
    "block_out_channels": [32, 64],
    "cross_attention_dim": 32,
    "encoder_hid_dim": 32,
    "attention_head_dim": 8,
    "addition_embed_type_num_heads": 2,
}
FIXTURES = {
    "stage I": {**FIXTURE, "layers_per_block": 1, "in_channels": 3},
    "stage II": {
        **FIXTURE,
        "layers_per_block": [1, 2],
        "in_channels": 6,
        "class_embed_type": "timestep",
        "mid_block_scale_factor": 1.414,
        "time_embedding_act_fn": "gelu",
        "time_embedding_dim": 32,
    },
}
