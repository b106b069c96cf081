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

COSINE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "beta_start": 1e-4, "beta_end": 0.02}
IF_SCHEDULER = {
    **COSINE,
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
    "sample_max_value": 1.5,
    "prediction_type": "epsilon",
    "variance_type": "learned_range",
}
# The fields that the published files have: not timestep_spacing, which DDPM's and DPM-Solver++'s schedulers read apart.
PUBLISHED = {
    "_diffusers_version": "0.16.0.dev0",
    **IF_SCHEDULER,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "trained_betas": None,
    "lambda_min_clipped": -5.1,
}
