"""Adapters apart from the stage that they were trained on: in files, combined with weights, put on a cascade's stage.

A file says which base it is for; one that says so is put on no other. Of a file nothing is executed: safetensors and
JSON alone are read, and no class that they name is looked at.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from imagen_lightning.cascade.checkpoints import checkpoint_file, read_checkpoint, stage_from_checkpoint
from imagen_lightning.cascade.description import as_module, stage_name
from imagen_lightning.cascade.local import first_line, refuse_address, whole_folder
from imagen_lightning.cascade.origin import check_record, merged_record
from imagen_lightning.components import describe
from imagen_lightning.export import diffusers_adapter, peft_adapter
from imagen_lightning.files import parse_json
from imagen_lightning.networks.lora import Factors, add_factors, check_factors, check_weight, factors, weights_digest
from imagen_lightning.stages import DiffusionMixin
from imagen_lightning.types import InputError

FORMATS = ("peft", "diffusers")
KEY = "imagen_lightning"  # of a file's metadata
VERSION = 1
_NOT_OF_THE_WEIGHTS = ("dropout", "recompute")  # arguments of a network that change nothing of what it computes


@dataclass(frozen=True)
class Adapter:
    """What is added to the layers of a network, and whose network that is.

    Attributes:
        layers: the factors of each adapted layer, by its name in the network.
        base: the identity of the stage that it is for (`base_identity`), None where a file does not say.
        weights_record: whether its factors are an average (see `imagen_lightning.cascade.origin`), None where a file
            does not say.
    """

    layers: dict[str, Factors]
    base: dict[str, Any] | None
    weights_record: dict[str, Any] | None = None


def base_identity(stage: DiffusionMixin) -> dict[str, Any]:
    """What an adapter's base is told by: weights, network, text, process; its origin, licences included, goes along."""
    encoder, network = stage.text.encoder, describe(stage.network)
    arguments = {name: value for name, value in network["init_args"].items() if name not in _NOT_OF_THE_WEIGHTS}
    return {
        "stage": stage_name(stage),
        "text encoder": None if encoder is None else encoder.name,
        "token length": None if encoder is None else encoder.max_tokens,
        "network": {"class_path": network["class_path"], "init_args": arguments},
        "image size": stage.image_size,
        "schedule": describe(stage.process.schedule),
        "parametrization": describe(stage.process.parametrization),
        "weights": weights_digest(as_module(stage)),
        "origin": stage.origin,
    }


# ---- from a run


def of_run(path: str | Path, trust: Iterable[str] = ()) -> Adapter:
    """The adapter that a run has trained, of its averaged weights where it averages them.

    Args:
        path: a .ckpt file, or a run folder, of which the latest checkpoint is taken.
        trust: packages beside this one whose classes the checkpoint may name.

    Raises:
        InputError: no checkpoint of a stage, none with an adapter, or one of a run that trained more than its adapter.
    """
    stage = stage_from_checkpoint(path, tuple(trust))
    if stage.adapter is None:
        raise InputError(f"{str(path)!r} has no adapter: all its weights were trained; make a cascade of it")
    base, before = base_identity(stage), read_checkpoint(checkpoint_file(Path(path).expanduser())).get("base_digest")
    if before not in (None, base["weights"]):
        raise InputError(
            f"{str(path)!r} trained other weights beside its adapter: they were {before} and are {base['weights']}; "
            "make a cascade of it"
        )
    return Adapter(factors(stage.network), base, stage.weights_record)


# ---- files


def save(adapter: Adapter, folder: str | Path, format: str = "peft") -> None:
    """Writes an adapter to a new or empty folder, whole or not at all.

    Args:
        adapter: with its base.
        folder: gets `adapter_config.json` and `adapter_model.safetensors`, or `pytorch_lora_weights.safetensors`.
        format: "peft" with this package's names of layers, or "diffusers" for `load_lora_weights` of its pipelines.

    Raises:
        InputError: another format, a network that diffusers cannot have, a folder that is not empty.
    """
    if format not in FORMATS:
        raise InputError(f"adapter format {format!r} is unknown; use one of {', '.join(FORMATS)}")
    if format == "peft":
        files = peft_adapter.to_files(adapter.layers)
    else:
        files = diffusers_adapter.to_files(adapter.layers, _network_arguments(adapter.base))
    ranks = {name: each.a.shape[0] for name, each in sorted(adapter.layers.items())}
    said = {"version": VERSION, "base": adapter.base, "ranks": ranks, "weights_record": adapter.weights_record}
    header = {KEY: json.dumps(said)}
    with whole_folder(folder) as partial:
        for name, tensors in files.tensors.items():
            plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
            try:
                save_file(plain, partial / name, {"format": "pt", **header, **files.header})
            except SafetensorError as error:  # a full disk
                raise InputError(f"adapter {str(folder)!r} cannot be written: {first_line(error)}") from None
            (partial / name).chmod(0o644)  # safetensors writes for us alone
        for name, content in files.json.items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load(path: str | Path, stage: DiffusionMixin) -> Adapter:
    """Reads an adapter of either format, checked to be one for the stage.

    Args:
        path: the folder, or the safetensors file in it.
        stage: without an adapter.

    Raises:
        InputError: no adapter, a damaged one, or one of a kind that is not read; another base, text encoder, token
            length or network than the stage's; layers that lack a part, are not the network's or of another shape.
    """
    refuse_address(path, "adapter")
    file = _weights_file(Path(path).expanduser())
    what = f"adapter {str(path)!r}"
    tensors, header = _read(file, what)
    said = _said(header, what)
    try:
        if file.name == peft_adapter.WEIGHTS:
            layers = peft_adapter.from_files(tensors, file.with_name(peft_adapter.CONFIG))
        else:
            layers = diffusers_adapter.from_tensors(tensors, header, describe(stage.network))
        adapter = Adapter(layers, said.get("base"), check_record(said.get("weights_record"), "its metadata"))
        if adapter.base is None:
            warnings.warn(
                f"{what} does not say which base it is for; names and shapes alone were checked", stacklevel=2
            )
        else:
            check_base(adapter.base, base_identity(stage))
            _check_layers(said.get("ranks") or {}, layers)
        check_factors(stage.network, layers)
    except InputError as error:
        raise InputError(f"{what}: {error}") from error
    return adapter


def check_base(wanted: Mapping[str, Any], stage: Mapping[str, Any]) -> None:
    """Raises InputError where a stage is not the base that an adapter is for, with both sides' values."""
    for name in ("text encoder", "token length", "image size", "schedule", "parametrization", "network", "weights"):
        there, here = wanted.get(name), stage[name]
        if there == here:
            continue
        if name == "network" and isinstance(there, Mapping):
            there, here = _first_difference(there, here)
        raise InputError(
            f"it is for a stage {wanted.get('stage')!r} with {name} {_plain(there)}, and stage {stage['stage']!r} has "
            f"{_plain(here)}; give the cascade that it was trained from"
        )


def _check_layers(ranks: Mapping[str, int], layers: Mapping[str, Factors]) -> None:
    for name, rank in ranks.items():
        found = layers[name].a.shape[0] if name in layers else "none"
        if found != rank:
            raise InputError(f"layer {name!r} was written with rank {rank}, and the file has {found}; copy it again")


def _first_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[Any, Any]:
    if there.get("class_path") != here["class_path"]:
        return there.get("class_path"), here["class_path"]
    mine, theirs = here["init_args"], there.get("init_args") or {}
    for name in sorted({*mine, *theirs}):
        if mine.get(name) != theirs.get(name):
            return f"{name} {theirs.get(name)}", f"{name} {mine.get(name)}"
    return there, here


def _plain(value: Any) -> str:
    if isinstance(value, Mapping) and "class_path" in value:
        name = str(value["class_path"]).rpartition(".")[2]
        return name + "".join(f" {key} {item}" for key, item in (value.get("init_args") or {}).items())
    return repr(value) if isinstance(value, str) else str(value)


def _network_arguments(base: Mapping[str, Any] | None) -> dict[str, Any]:
    if base is None:
        raise InputError("the adapter does not say of which network it is; load it from a run, or from peft's format")
    return base["network"]


def _weights_file(path: Path) -> Path:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise InputError(f"adapter {str(path)!r} is no .safetensors file; others can hold code and are not read")
        return path
    for name in (peft_adapter.WEIGHTS, diffusers_adapter.WEIGHTS):
        if (path / name).is_file():
            return path / name
    raise InputError(
        f"{str(path)!r} holds no adapter: no {peft_adapter.WEIGHTS} and no {diffusers_adapter.WEIGHTS}; "
        "`imagen-lightning adapter` writes either"
    )


def _read(file: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  (no mapping)
            return tensors, content.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{what} is damaged ({first_line(error)}); copy it again") from error


def _said(header: Mapping[str, str], what: str) -> dict[str, Any]:
    """What the file says of itself; nothing where another program wrote it."""
    if KEY not in header:
        return {}
    try:
        said = parse_json(header[KEY])
    except ValueError as error:
        raise InputError(f"{what} is damaged: {first_line(error)}; copy it again") from error
    if not isinstance(said, dict) or said.get("version") != VERSION:
        raise InputError(f"{what} is of a version that is not read here, which is {VERSION}")
    return said


# ---- using them


def combine(adapters: Sequence[tuple[Adapter, float]]) -> Adapter:
    """One adapter that adds the weighted sum of what each of several adds, exactly: their ranks add up.

    Args:
        adapters: each with its weight, all of one base.

    Raises:
        InputError: none, ones of different bases, or a weight that is not finite.
    """
    if not adapters:
        raise InputError("there are no adapters to combine; give at least one")
    base = adapters[0][0].base
    for _, weight in adapters:
        check_weight(weight)
    for adapter, _ in adapters[1:]:
        if base is not None and adapter.base is not None:
            check_base(adapter.base, base)
    layers: dict[str, Factors] = {}
    for name in sorted({name for adapter, _ in adapters for name in adapter.layers}):
        parts = [(adapter.layers[name], weight) for adapter, weight in adapters if name in adapter.layers]
        a = torch.cat([each.a for each, _ in parts])
        b = torch.cat([weight * each.scale * each.b for each, weight in parts], dim=1)
        layers[name] = Factors(a, b, 1.0)
    return Adapter(layers, base)


def apply(stage: DiffusionMixin, adapters: Sequence[tuple[str | Path, float]]) -> None:
    """Adds the weighted sum of what adapters in files add to the stage's weights, in float32 or finer.

    Args:
        stage: their base, without an adapter of its own; as it was where one of them is refused.
        adapters: each file or folder with its weight.

    Raises:
        InputError: as `load`; a weight that is not finite.
    """
    if stage.adapter is not None:
        raise InputError(f"stage {stage_name(stage)!r} has an adapter of its own; merge it first")
    for _, weight in adapters:
        check_weight(weight)
    loaded = [(load(path, stage), weight) for path, weight in adapters]  # all are checked before any is added
    for adapter, weight in loaded:
        add_factors(stage.network, adapter.layers, weight)
    stage.weights_record = merged_record(stage.weights_record, [adapter.weights_record for adapter, _ in loaded])
