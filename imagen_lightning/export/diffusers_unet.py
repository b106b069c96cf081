"""DeepFloyd IF's U-Nets as diffusers keeps them (`UNet2DConditionModel`), to and from `UNet`.

`unet_arguments` reads a config.json, `unet_config` writes one; `from_diffusers` and `to_diffusers` carry the weights
over, each tensor's bits as they are. Nothing here needs diffusers. What the two networks are given differs in three
ways:

- diffusers' `class_labels` are 1000 times our `aug_level`;
- its `sample` is x_t and the enlarged low-resolution image in one tensor;
- IF gives its network no mask of the text: `Text.mask` None.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from imagen_lightning.networks import UNet
from imagen_lightning.types import InputError

PLAIN_DOWN, PLAIN_UP = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
TEXT_DOWN, TEXT_UP = "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D"

# The model's own defaults, which a config.json may leave out.
DEFAULTS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1.0,
    "dropout": 0.0,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "attention_head_dim": 8,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "cross_attention_norm": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "resnet_time_scale_shift": "default",
}
# What a field must be, since UNet knows nothing else.
REQUIRED: dict[str, Any] = {
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "resnet_time_scale_shift": "scale_shift",
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "only_cross_attention": False,
    "mid_block_only_cross_attention": None,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "use_linear_projection": False,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "upcast_attention": False,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
}
# Fields that IF's blocks do not look at. The size is the stage's affair.
UNREAD = ("sample_size", "downsample_padding", "transformer_layers_per_block", "reverse_transformer_layers_per_block")

# diffusers' model makes the up blocks from the last level on, yet takes their head_dim in the order of the levels.
PALINDROME = "one number, or a list that reads the same from both ends"

# What UNet can do and diffusers' model cannot.
OURS_ALONE: dict[str, Any] = {"patch_size": 1, "skip_scale": 1.0}


def unet_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the `UNet` that a config.json describes.

    Raises:
        InputError: a field has a value that `UNet` cannot have, or is unknown; all such fields are named.
    """
    given = {key: _plain(value) for key, value in config.items() if not key.startswith("_")}
    wrong = [
        f"{key} {value!r}"
        for key, value in given.items()
        if key not in DEFAULTS and key not in REQUIRED and key not in UNREAD
    ]
    full: dict[str, Any] = {**REQUIRED, **{key: _plain(value) for key, value in DEFAULTS.items()}, **given}
    if full["mid_block_only_cross_attention"] is False:  # None follows only_cross_attention
        full["mid_block_only_cross_attention"] = None
    wrong += [f"{key} {full[key]!r} (not {value!r})" for key, value in REQUIRED.items() if full[key] != value]

    def check(key: str, right: bool, mend: str) -> None:
        if not right:
            wrong.append(f"{key} {full[key]!r} ({mend})")

    widths, down, up = full["block_out_channels"], full["down_block_types"], full["up_block_types"]
    attention = [kind == TEXT_DOWN for kind in down]
    check("down_block_types", all(kind in (PLAIN_DOWN, TEXT_DOWN) for kind in down), f"{PLAIN_DOWN} or {TEXT_DOWN}")
    mirrored = [TEXT_UP if attends else PLAIN_UP for attends in reversed(attention)]
    check("up_block_types", up == mirrored, f"not the mirror image of down_block_types: {mirrored}")
    check("down_block_types", attention[-1:] == [True], "the last level must attend, as the middle does")
    check("block_out_channels", len(widths) == len(down), f"not one a level of {len(down)}")
    check("act_fn", full["act_fn"] in ("silu", "swish", "gelu"), "not silu or gelu")
    check("norm_num_groups", full["norm_num_groups"] is not None, "a number")
    check("cross_attention_dim", isinstance(full["cross_attention_dim"], int), "one number")
    heads = full["attention_head_dim"]
    check("attention_head_dim", isinstance(heads, int) or heads == heads[::-1], PALINDROME)
    check("encoder_hid_dim_type", full["encoder_hid_dim_type"] in (None, "text_proj"), "not text_proj")
    hidden = full["encoder_hid_dim"]
    check("encoder_hid_dim", hidden is not None or full["encoder_hid_dim_type"] is None, "a number for text_proj")
    check("class_embed_type", full["class_embed_type"] in (None, "timestep"), "not timestep")
    check("addition_embed_type", full["addition_embed_type"] in (None, "text"), "not text")
    check("cross_attention_norm", full["cross_attention_norm"] in (None, "group_norm"), "not group_norm")
    low_res = full["class_embed_type"] == "timestep"
    check("in_channels", not low_res or full["in_channels"] % 2 == 0, "even, where low_res is concatenated")
    act, embedding_act = full["act_fn"], full["time_embedding_act_fn"]
    act, embedding_act = ("silu" if name == "swish" else name for name in (act, embedding_act))
    check("time_embedding_act_fn", embedding_act in (None, "silu", "gelu"), "not silu or gelu")
    if wrong:
        raise InputError(f"UNet cannot be the U-Net of this config: {'; '.join(wrong)}")

    embedding_activations = None
    if embedding_act is not None or full["resnet_skip_time_act"]:
        embedding_activations = [] if embedding_act is None else [embedding_act]
        embedding_activations += [] if full["resnet_skip_time_act"] else [act]
    return {
        "dim": widths[0],
        "multipliers": [_ratio(width, widths[0]) for width in widths],
        "num_blocks": full["layers_per_block"],
        "attention": attention,
        "text_dim": full["cross_attention_dim"] if hidden is None else hidden,
        "low_res": low_res,
        "head_dim": full["attention_head_dim"],
        "groups": full["norm_num_groups"],
        "dropout": full["dropout"],
        "channels": full["in_channels"] // 2 if low_res else full["in_channels"],
        "out_channels": full["out_channels"],
        "time_dim": full["time_embedding_dim"],
        "activation": act,
        "embedding_activations": embedding_activations,
        "eps": full["norm_eps"],
        "text_projection": full["cross_attention_dim"] if hidden is not None else None,
        "text_norm": "none" if full["cross_attention_norm"] is None else "group",
        "text_pooling": "none" if full["addition_embed_type"] is None else "attention",
        "pooling_heads": full["addition_embed_type_num_heads"],
        "mid_scale": full["mid_block_scale_factor"],
        "out_scale": full["resnet_out_scale_factor"],
    }


def unet_config(arguments: Mapping[str, Any], sample_size: int | None = None) -> dict[str, Any]:
    """The config.json of the model that is the `UNet` of these arguments, e.g. of `describe_args(network)`.

    Args:
        arguments: of `UNet`'s `__init__`; those left out have its defaults.
        sample_size: pixels along a side of the images, which the network itself does not know.

    Raises:
        InputError: an argument has a value that diffusers' model cannot have; all such arguments are named.
    """
    a = _with_defaults(arguments)
    wrong = [f"{key} {a[key]!r} (not {value!r})" for key, value in OURS_ALONE.items() if a[key] != value]
    activations = a["embedding_activations"]
    endings: dict[str, Any] = {"time_embedding_act_fn": None, "resnet_skip_time_act": False}
    if activations is not None:
        after = activations[1:] or [None]
        endings = {"time_embedding_act_fn": (activations or [None])[0], "resnet_skip_time_act": after == [None]}
        if after not in ([None], [a["activation"]]):
            wrong.append(f"embedding_activations {activations!r} (at most one, then {a['activation']!r})")
    if a["text_dim"] is None:
        wrong.append("text_dim None (a number)")
    if not list(a["attention"])[-1]:
        wrong.append(f"attention {list(a['attention'])} (the last level must attend)")
    if not isinstance(a["head_dim"], int) and list(a["head_dim"]) != list(a["head_dim"])[::-1]:
        wrong.append(f"head_dim {a['head_dim']} ({PALINDROME})")
    if a["text_norm"] == "layer":
        wrong.append("text_norm 'layer' ('group' or 'none')")
    if a["text_pooling"] == "mean":
        wrong.append("text_pooling 'mean' ('attention' or 'none')")
    if wrong:
        raise InputError(f"diffusers' UNet2DConditionModel cannot be this UNet: {'; '.join(wrong)}")
    projection = a["text_projection"]
    return {
        "_class_name": "UNet2DConditionModel",
        **REQUIRED,
        **endings,
        "sample_size": sample_size,
        "in_channels": a["channels"] * (2 if a["low_res"] else 1),
        "out_channels": a["out_channels"],
        "down_block_types": [TEXT_DOWN if attends else PLAIN_DOWN for attends in a["attention"]],
        "up_block_types": [TEXT_UP if attends else PLAIN_UP for attends in reversed(a["attention"])],
        "block_out_channels": [round(a["dim"] * multiplier) for multiplier in a["multipliers"]],
        "layers_per_block": a["num_blocks"],
        "mid_block_scale_factor": a["mid_scale"],
        "resnet_out_scale_factor": a["out_scale"],
        "dropout": a["dropout"],
        "act_fn": a["activation"],
        "norm_num_groups": a["groups"],
        "norm_eps": a["eps"],
        "cross_attention_dim": a["text_dim"] if projection is None else projection,
        "encoder_hid_dim": None if projection is None else a["text_dim"],
        "encoder_hid_dim_type": None if projection is None else "text_proj",
        "attention_head_dim": a["head_dim"],
        "class_embed_type": "timestep" if a["low_res"] else None,
        "addition_embed_type": "text" if a["text_pooling"] == "attention" else None,
        "addition_embed_type_num_heads": a["pooling_heads"],
        "time_embedding_dim": a["time_dim"],
        "cross_attention_norm": "group_norm" if a["text_norm"] == "group" else None,
    }


def from_diffusers(state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of `UNet(**arguments)` from that of diffusers' model, dtypes as they are.

    Raises:
        InputError: tensors are missing, or are not the network's.
    """
    table = names(arguments)
    wanted = {theirs for sources in table.values() for theirs in sources}
    _check_names(set(state), wanted)
    return {ours: _joined([state[theirs] for theirs in sources]) for ours, sources in table.items()}


def to_diffusers(state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of diffusers' model from that of `UNet(**arguments)`: the inverse of `from_diffusers`.

    Raises:
        InputError: tensors are missing, or are not the network's.
    """
    table = names(arguments)
    _check_names(set(state), set(table))
    parts = {}
    for ours, targets in table.items():
        for theirs, part in zip(targets, state[ours].chunk(len(targets))):
            parts[theirs] = part.contiguous() if len(targets) == 1 else part.clone()
    return parts


def names(arguments: Mapping[str, Any]) -> dict[str, list[str]]:
    """For each tensor of `UNet(**arguments)` those of diffusers' model that, one below the other, make it.

    Raises:
        InputError: diffusers' model cannot be this UNet.
    """
    a, config = _with_defaults(arguments), unet_config(arguments)
    widths = config["block_out_channels"]
    levels = len(widths)
    blocks = [a["num_blocks"]] * levels if isinstance(a["num_blocks"], int) else list(a["num_blocks"])
    table: dict[str, list[str]] = {}

    def layer(ours: str, *theirs: str) -> None:
        for kind in ("weight", "bias"):
            table[f"{ours}.{kind}"] = [f"{name}.{kind}" for name in theirs]

    def residual(ours: str, theirs: str, inputs: int, outputs: int) -> None:
        for name in ("norm1", "conv1", "norm2", "conv2"):
            layer(f"{ours}.{name}", f"{theirs}.{name}")
        layer(f"{ours}.time", f"{theirs}.time_emb_proj")
        if inputs != outputs:
            layer(f"{ours}.shortcut", f"{theirs}.conv_shortcut")

    def attention(ours: str, theirs: str) -> None:
        layer(f"{ours}.norm", f"{theirs}.group_norm")
        layer(f"{ours}.to_qkv", *(f"{theirs}.{name}" for name in ("to_q", "to_k", "to_v")))
        if a["text_norm"] == "group":
            layer(f"{ours}.text_norm", f"{theirs}.norm_cross")
        layer(f"{ours}.text_to_kv", f"{theirs}.add_k_proj", f"{theirs}.add_v_proj")
        layer(f"{ours}.to_out", f"{theirs}.to_out.0")

    embeddings = {"time_embedding": "time_embedding"} | ({"aug_embedding": "class_embedding"} if a["low_res"] else {})
    for ours, theirs in embeddings.items():
        layer(f"{ours}.net.0", f"{theirs}.linear_1")
        layer(f"{ours}.net.2", f"{theirs}.linear_2")
    if a["text_projection"] is not None:
        layer("project_text", "encoder_hid_proj")
    if a["text_pooling"] == "attention":
        table["text_embedding.position"] = ["add_embedding.pool.positional_embedding"]
        layer("text_embedding.norm_in", "add_embedding.norm1")
        layer("text_embedding.to_q", "add_embedding.pool.q_proj")
        layer("text_embedding.to_kv", "add_embedding.pool.k_proj", "add_embedding.pool.v_proj")
        layer("text_embedding.project", "add_embedding.proj")
        layer("text_embedding.norm_out", "add_embedding.norm2")
    for ours, theirs in {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}.items():
        layer(ours, theirs)

    width, skips, index = widths[0], [widths[0]], 0
    for level, out in enumerate(widths):
        for i in range(blocks[level]):
            residual(f"down_blocks.{index}", f"down_blocks.{level}.resnets.{i}", width, out)
            if a["attention"][level]:
                attention(f"down_attention.{index}", f"down_blocks.{level}.attentions.{i}")
            width, index = out, index + 1
            skips.append(width)
        if level < levels - 1:
            residual(f"down_blocks.{index}", f"down_blocks.{level}.downsamplers.0", width, width)
            index += 1
            skips.append(width)
    residual("mid_in", "mid_block.resnets.0", width, width)
    attention("mid_attention", "mid_block.attentions.0")
    residual("mid_out", "mid_block.resnets.1", width, width)
    index = 0
    for place, level in enumerate(reversed(range(levels))):
        out = widths[level]
        for i in range(blocks[level] + 1):
            residual(f"up_blocks.{index}", f"up_blocks.{place}.resnets.{i}", width + skips.pop(), out)
            if a["attention"][level]:
                attention(f"up_attention.{index}", f"up_blocks.{place}.attentions.{i}")
            width, index = out, index + 1
        if level > 0:
            residual(f"up_blocks.{index}", f"up_blocks.{place}.upsamplers.0", width, width)
            index += 1
    return table


def _check_names(given: set[str], wanted: set[str]) -> None:
    for what, rest in (("lacks", wanted - given), ("has unknown", given - wanted)):
        if rest:
            some = ", ".join(sorted(rest)[:3])
            raise InputError(
                f"the state dict {what} {len(rest)} tensors ({some}{', …' if len(rest) > 3 else ''}): it belongs to "
                f"another network than its config says"
            )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def _with_defaults(arguments: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {name: p.default for name, p in inspect.signature(UNet).parameters.items()}
    unknown = [name for name in arguments if name not in defaults]
    if unknown:
        raise InputError(f"UNet has no arguments {', '.join(map(repr, unknown))}")
    return {**defaults, **arguments}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _ratio(width: int, dim: int) -> float:
    return width // dim if width % dim == 0 else width / dim
