"""Adapters as peft keeps them: adapter_config.json and adapter_model.safetensors, with this package's layer names."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from imagen_lightning.cascade.local import first_line
from imagen_lightning.files import parse_json
from imagen_lightning.networks.lora import Factors
from imagen_lightning.types import InputError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings of a config that say where and how an adapter was made, and not what it computes.
_ASIDE = {
    "auto_mapping", "base_model_name_or_path", "peft_type", "peft_version", "revision", "task_type", "inference_mode",
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "bias",
}  # fmt: skip
_DEFAULTS = {"megatron_core": "megatron.core", "qalora_group_size": 16}  # of settings that others turn on
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "orthogonal")  # others change the base's weights too


@dataclass
class Files:
    """What a format's folder holds: tensors by file, JSON by file, and what its tensors' header says beside ours."""

    tensors: dict[str, dict[str, Tensor]]
    json: dict[str, Any] = field(default_factory=dict)
    header: dict[str, str] = field(default_factory=dict)


def to_files(layers: Mapping[str, Factors]) -> Files:
    """The files of an adapter."""
    tensors, ranks, alphas = {}, {}, {}
    for name, each in sorted(layers.items()):
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = each.a, each.b
        ranks[name] = each.a.shape[0]
        alphas[name] = _number(each.scale * ranks[name])
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": "|".join(map(re.escape, ranks)),
        "rank_pattern": {f"^{re.escape(name)}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "task_type": None,
        "base_model_name_or_path": None,
    }
    return Files({WEIGHTS: tensors}, {CONFIG: config})


def from_files(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Factors]:
    """The factors of each layer.

    Raises:
        InputError: no config, a kind of adapter that is not read, tensors that are nothing of a LoRA, a missing one.
    """
    config = _read_config(path)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key.removeprefix(PREFIX))
        if match is None:
            raise InputError(f"tensor {key!r} is no part of a plain LoRA, which alone is read")
        pairs.setdefault(match[1], {})[match[2]] = value
    return {name: _factors(name, pair, config) for name, pair in pairs.items()}


def checked_pair(name: str, pair: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A and B of a layer.

    Raises:
        InputError: one is missing.
    """
    for part, other in (("A", "B"), ("B", "A")):
        if part not in pair:
            raise InputError(f"layer {name!r} has lora_{other} and no lora_{part}; copy the file again")
    return pair["A"], pair["B"]


def scale_of(name: str, rank: int, config: Mapping[str, Any]) -> float:
    """alpha / rank as a config has them for a layer; alpha / sqrt(rank) with use_rslora."""
    alpha = _for_layer(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8))
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise InputError(f"lora_alpha {alpha!r} of layer {name!r} is no number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def check_config(config: Mapping[str, Any]) -> None:
    """Raises InputError for settings with which an adapter computes something else than W x + scale B A x."""
    if config.get("init_lora_weights") not in _PLAIN_BEGINNINGS:
        raise InputError(f"init_lora_weights {config['init_lora_weights']!r} changes the base too, and is not read")
    other = [name for name, value in config.items() if name not in _ASIDE and value and value != _DEFAULTS.get(name)]
    other += ["bias"] if config.get("bias", "none") != "none" else []
    if other:
        raise InputError(f"{other[0]} {config[other[0]]!r} makes it more than a plain LoRA, which alone is read")


def _factors(name: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]) -> Factors:
    a, b = checked_pair(name, pair)
    return Factors(a, b, scale_of(name, a.shape[0], config))


def _for_layer(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that ends a layer's name, as peft matches it."""
    for pattern, value in patterns.items():
        plain = re.sub(r"\\(.)", r"\1", str(pattern))
        if name == plain.removeprefix("^") or (not plain.startswith("^") and name.endswith(f".{plain}")):
            return value
    return default


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"its {path.name} cannot be read ({first_line(error)}); copy the whole folder") from error
    except ValueError as error:
        raise InputError(f"its {path.name} is damaged ({first_line(error)}); copy it again") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InputError(f"its {path.name} is not of a LoRA, which alone is read")
    check_config(config)
    return config


def _number(value: float) -> float | int:
    return round(value) if value == round(value) else value
