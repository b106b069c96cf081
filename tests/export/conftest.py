"""Tiny random pipelines of DeepFloyd IF, made by diffusers and transformers themselves."""

import imagen_lightning.torchvision_mend  # noqa: F401  isort: skip

import json
import shutil

import pytest
import torch
from diffusers import DDPMScheduler, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnAddedKVProcessor
from given_data import t5_tokenizer
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from if_shapes import COMMON, COSINE, FIXTURES, IF_SCHEDULER, PUBLISHED, blocks  # isort: skip

UNETS = {
    **FIXTURES,
    "larger stage I": {
        **COMMON,
        **blocks(1, 3),
        "sample_size": 64,
        "in_channels": 3,
        "block_out_channels": [32, 64, 96, 128],
        "layers_per_block": 2,
        "cross_attention_dim": 128,
        "encoder_hid_dim": 64,
        "encoder_hid_dim_type": "text_proj",
        "attention_head_dim": 16,
        "addition_embed_type_num_heads": 16,
    },
    "larger stage II": {
        **COMMON,
        **blocks(3, 2),
        "sample_size": 64,
        "in_channels": 6,
        "block_out_channels": [32, 64, 64, 96, 128],
        "layers_per_block": [1, 1, 2, 2, 2],
        "cross_attention_dim": 128,
        "encoder_hid_dim": 32,
        "encoder_hid_dim_type": "text_proj",
        "attention_head_dim": 32,
        "addition_embed_type_num_heads": 16,
        "class_embed_type": "timestep",
        "resnet_skip_time_act": True,
        "resnet_out_scale_factor": 1.4142271,
        "mid_block_scale_factor": 1.4142271,
        "time_embedding_dim": 128,
        "time_embedding_act_fn": "gelu",
    },
}
# A random network's epsilon has nothing to do with the noise. At its full size it makes a sampling run chaotic: a
# rounding error grows a thousandfold in twenty steps, and no two programs draw the same image. Its rounding is also
# multiplied by the guidance and, where DPM-Solver++ begins, by sigma / alpha = 160, before any thresholding.
GAIN = 0.01


def make_encoder(width):
    torch.manual_seed(0)
    config = T5Config(
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        vocab_size=32128,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()


def make_unet(name, seed=0, gain=GAIN):
    """Random weights, no layer's zero or identity, so that text, low-res image and level all count."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**UNETS[name]).eval()
    unet.set_attn_processor(AttnAddedKVProcessor())
    with torch.no_grad():
        for key, parameter in unet.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "time_emb_proj" in key or "add_" in key:
                parameter.mul_(2)
        unet.conv_out.weight.mul_(gain)
        unet.conv_out.bias.mul_(gain)
    return unet


def make_pipeline(name, with_text=True, seed=0, gain=GAIN):
    unet = make_unet(name, seed, gain)
    low_res = unet.config.in_channels == 6
    encoder = tokenizer = None
    if with_text:
        encoder, tokenizer = make_encoder(unet.config.encoder_hid_dim), AutoTokenizer.from_pretrained(t5_tokenizer())
    settings = {**IF_SCHEDULER, "sample_max_value": 1.0 if low_res else 1.5}
    parts = {
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "unet": unet,
        "scheduler": DDPMScheduler(**settings),
        "safety_checker": None,
        "feature_extractor": None,
        "watermarker": None,
        "requires_safety_checker": False,
    }
    if low_res:
        parts["image_noising_scheduler"] = DDPMScheduler(**COSINE)
    made = (IFSuperResolutionPipeline if low_res else IFPipeline)(**parts)
    made.set_progress_bar_config(disable=True)
    return made


CARD = """---
license: other
license_name: deepfloyd-if-license
license_link: https://example.org/licence
---
# A model
"""


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Folders of pipelines by name, each with a model card and a licence."""
    root, folders = tmp_path_factory.mktemp("pipelines"), {}

    def of(name, **options):
        key = (name, *sorted(options.items()))
        if key not in folders:
            folders[key] = root / f"{name.replace(' ', '-')}-{len(folders)}"
            pipeline = make_pipeline(name, **options)
            pipeline.save_pretrained(folders[key])
            config = {"_class_name": "DDPMScheduler", **PUBLISHED, "sample_max_value": 1.0 if "II" in name else 1.5}
            (folders[key] / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
            (folders[key] / "README.md").write_text(CARD)
            (folders[key] / "LICENSE.md").write_text("The licence's text.\n")
        return folders[key]

    return of


@pytest.fixture
def copied(saved, tmp_path):
    """A pipeline's folder to change."""

    def of(name, **options):
        folder = tmp_path / "pipeline"
        shutil.copytree(saved(name, **options), folder)
        return folder

    return of
