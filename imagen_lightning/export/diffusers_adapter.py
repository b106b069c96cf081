"""Adapters of DeepFloyd IF's U-Nets as diffusers keeps them: pytorch_lora_weights.safetensors.

Our layers are fused where diffusers' are apart: `to_qkv` is its `to_q`, `to_k` and `to_v`, `text_to_kv` its
`add_k_proj` and `add_v_proj`. A fused layer's B falls into parts that share its A. Parts that do not share one become
one fused adapter whose rank is the sum of theirs, B in blocks. Both are exact.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from imagen_lightning.components import class_path
from imagen_lightning.export.diffusers_unet import names
from imagen_lightning.export.peft_adapter import Files, check_config, checked_pair, scale_of
from imagen_lightning.files import parse_json
from imagen_lightning.networks import UNet
from imagen_lightning.networks.lora import Factors
from imagen_lightning.types import InputError

WEIGHTS = "pytorch_lora_weights.safetensors"
PREFIX = "unet."
_METADATA = "lora_adapter_metadata"
# An older file's names of a layer's parts.
_OLD = {
    r"\.processor\.(to_q|to_k|to_v|add_k_proj|add_v_proj)_lora\.": r".\1.lora.",
    r"\.processor\.to_out_lora\.": ".to_out.0.lora.",
    r"\.lora_linear_layer\.": ".lora.",
    r"\.lora\.down\.weight$": ".lora_A.weight",
    r"\.lora\.up\.weight$": ".lora_B.weight",
}


def to_files(layers: Mapping[str, Factors], network: Mapping[str, Any]) -> Files:
    """The file of an adapter; alpha / rank is in B, as loaders without metadata take it.

    Args:
        layers: the factors of each layer.
        network: the described `UNet` that they belong to.

    Raises:
        InputError: a network that diffusers cannot have.
    """
    table, tensors = _layer_names(network), {}
    for name, each in sorted(layers.items()):
        b = each.b if each.scale == 1 else each.scale * each.b
        for theirs, part in zip(table[name], b.chunk(len(table[name]))):
            tensors[f"{PREFIX}{theirs}.lora_A.weight"], tensors[f"{PREFIX}{theirs}.lora_B.weight"] = each.a, part
    return Files({WEIGHTS: tensors})


def from_tensors(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], network: Mapping[str, Any]
) -> dict[str, Factors]:
    """The factors of each layer of our network.

    Args:
        tensors: of the file.
        header: its metadata.
        network: the described `UNet` that they are for.

    Raises:
        InputError: a network that diffusers cannot have; tensors that are nothing of a LoRA of a U-Net, or of no layer
            of this one; a missing one; settings that are not read.
    """
    table = _layer_names(network)
    ours = {theirs: name for name, parts in table.items() for theirs in parts}
    config = _config(header)
    pairs: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, value in tensors.items():
        plain = _plain(key)
        if match := re.fullmatch(r"(.+)\.alpha", plain):
            alphas[match[1]] = float(value)
        elif match := re.fullmatch(r"(.+)\.lora_([AB])\.weight", plain):
            pairs.setdefault(match[1], {})[match[2]] = value
        else:
            raise InputError(f"tensor {key!r} is no part of a plain LoRA of a U-Net, which alone is read")
    found: dict[str, Factors] = {}
    for theirs, pair in pairs.items():
        if theirs not in ours:
            raise InputError(f"layer {theirs!r} is none of the network's; it belongs to another base")
        a, b = checked_pair(theirs, pair)
        rank = a.shape[0]
        scale = alphas[theirs] / rank if theirs in alphas else scale_of(theirs, rank, config) if config else 1.0
        found[theirs] = Factors(a, b, scale)
    touched = {ours[theirs] for theirs in found}
    return {name: _fused([found.get(theirs) for theirs in table[name]]) for name in table if name in touched}


def _fused(parts: list[Factors | None]) -> Factors:
    """One adapter of a layer whose parts lie one below the other, of those that they have."""
    there = [part for part in parts if part is not None]
    first = there[0]
    if len(parts) == 1:
        return first
    alike = [part.scale == first.scale and torch.equal(part.a, first.a) for part in there]
    if len(there) == len(parts) and all(alike):
        return Factors(first.a, torch.cat([part.b for part in there]), first.scale)
    height = first.b.shape[0]  # all parts of a fused layer are equally high
    a = torch.cat([part.a for part in there])
    b = a.new_zeros(len(parts) * height, a.shape[0], *first.b.shape[2:])
    column = 0
    for row, part in enumerate(parts):
        if part is not None:
            if part.b.shape[0] != height:
                raise InputError(f"parts of one fused layer give {part.b.shape[0]} and {height} features")
            rank = part.a.shape[0]
            b[row * height : (row + 1) * height, column : column + rank] = part.scale * part.b
            column += rank
    return Factors(a, b, 1.0)


def _layer_names(network: Mapping[str, Any]) -> dict[str, list[str]]:
    """For each layer of the network those of diffusers' model that make it."""
    if network["class_path"] != class_path(UNet):
        raise InputError(f"diffusers has no such network as {network['class_path']}; use peft's format")
    table = names(network["init_args"])
    return {
        ours.removesuffix(".weight"): [theirs.removesuffix(".weight") for theirs in parts]
        for ours, parts in table.items()
        if ours.endswith(".weight")
    }


def _plain(key: str) -> str:
    """A tensor's name without the model's, in today's spelling."""
    for prefix in ("text_encoder", "transformer"):
        if key.startswith(prefix):
            raise InputError(f"tensor {key!r} adapts a {prefix.replace('_', ' ')}, which a stage has none of")
    key = key.removeprefix(PREFIX)
    for old, new in _OLD.items():
        key = re.sub(old, new, key)
    return key


def _config(header: Mapping[str, str]) -> dict[str, Any]:
    """The U-Net's settings in a file's metadata, or none."""
    if _METADATA not in header:
        return {}
    try:
        content = parse_json(header[_METADATA])
    except ValueError as error:
        raise InputError(f"its {_METADATA} is damaged; copy the file again") from error
    if not isinstance(content, dict):
        raise InputError(f"its {_METADATA} is damaged; copy the file again")
    config = {key.removeprefix(PREFIX): value for key, value in content.items() if key.startswith(PREFIX)}
    config = config or content
    check_config(config)
    return config
