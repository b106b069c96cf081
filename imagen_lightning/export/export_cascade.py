"""A cascade to folders that diffusers' IFPipeline and IFSuperResolutionPipeline load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from imagen_lightning.cascade.description import as_module, build_stage
from imagen_lightning.cascade.folder import stage_entry
from imagen_lightning.cascade.local import whole_folder
from imagen_lightning.cascade.manifest import read_manifest
from imagen_lightning.cascade.origin import check_origin, check_record
from imagen_lightning.cascade.tensors import write_tensors
from imagen_lightning.cascade.weights import load_stage_weights, stored_shapes
from imagen_lightning.components import describe_args
from imagen_lightning.export.diffusers_folder import INDEX, SETTINGS, TEXT_ENCODER, TOKENIZER, WEIGHTS
from imagen_lightning.export.diffusers_unet import to_diffusers
from imagen_lightning.export.export_stage import SETTINGS_FORMAT, StageConfigs, stage_configs
from imagen_lightning.export.model_card import licence_text, model_card
from imagen_lightning.stages import DiffusionMixin
from imagen_lightning.text import T5TextEncoder
from imagen_lightning.types import InputError

OLDEST_DIFFUSERS = "0.39.0"  # named where none is installed
COPIES = ("copy", "reference")
TOKENIZER_FILES = ("spiece.model", "*token*.json")


def export_cascade(cascade: str | Path, out: str | Path, text_encoder: str | None = None) -> list[Path]:
    """Writes one pipeline a stage to a new folder, whole or not at all: stage_1, stage_2, …

    Args:
        cascade: its folder. Its weights are read one stage at a time and written in the type that they have.
        out: new or empty.
        text_encoder: "copy" writes the text encoder and its tokenizer into stage_1; "reference" leaves them out, and
            the model card says which they are. None copies those of a local folder.

    Returns:
        The pipelines' folders.

    Raises:
        InputError: no cascade; a stage that the pipelines cannot be, all such stages' reasons named; an encoder that
            cannot be copied; an output folder that is not empty.
    """
    if text_encoder not in (None, *COPIES):
        raise InputError(f"text encoder {text_encoder!r} is unknown; use {' or '.join(COPIES)}")
    path, manifest = read_manifest(cascade)
    stages: list[DiffusionMixin] = []
    for entry in manifest["stages"]:
        what = f"stage {entry['name']!r} of {path}"
        stages.append(build_stage(entry["stage"], (), what, stored_shapes(path.parent, entry, what)))
        stages[-1].origin = check_origin(entry.get("origin"), what)
        stages[-1].weights_record = check_record(entry["weights"].get("record"), what)
    configs = _all_configs(stages)
    encoder = stages[0].text.encoder
    assert isinstance(encoder, T5TextEncoder)
    copied = _encoder_files(encoder) if text_encoder != "reference" else []
    if text_encoder == "copy" and not copied:
        raise InputError(
            f"text encoder {encoder.name_or_path!r} lies in no local folder and cannot be copied; export by reference, "
            "or fetch it and import the cascade with --text-encoder FOLDER"
        )
    with whole_folder(out) as partial:
        (partial / "README.md").write_text(model_card(stages, bool(copied), manifest["metrics"]), encoding="utf-8")
        for number, (entry, stage, config) in enumerate(zip(manifest["stages"], stages, configs), 1):
            folder = partial / f"stage_{number}"
            _write_configs(folder, config, bool(copied) and number == 1)
            _write_json(folder / SETTINGS, {"format": SETTINGS_FORMAT, **_settings(stage)})
            (folder / "README.md").write_text(model_card([stage], bool(copied) and number == 1, []), encoding="utf-8")
            if licence := licence_text(stage.origin):
                (folder / "LICENSE").write_text(licence, encoding="utf-8")
            _write_weights(folder / "unet", path.parent, entry, stage)
        for source, place in copied:
            (partial / "stage_1" / place).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, partial / "stage_1" / place / source.name)
    return [Path(out) / f"stage_{number}" for number in range(1, len(stages) + 1)]


def _all_configs(stages: list[DiffusionMixin]) -> list[StageConfigs]:
    configs, refused = [], []
    for stage in stages:
        try:
            configs.append(stage_configs(stage))
        except InputError as error:  # noqa: PERF203
            refused.append(str(error))
    if refused:
        raise InputError(". ".join(refused))
    return configs


def _settings(stage: DiffusionMixin) -> dict[str, Any]:
    entry = stage_entry(stage)
    return {"stage": entry["stage"], "origin": entry["origin"], "weights_record": stage.weights_record}


def _write_configs(folder: Path, configs: StageConfigs, with_text: bool) -> None:
    """model_index.json and the configs of the pipeline's parts."""
    library = _diffusers_version()
    nothing = [None, None]
    index: dict[str, Any] = {
        "_class_name": configs.kind,
        "_diffusers_version": library,
        "feature_extractor": nothing,
        "requires_safety_checker": False,
        "safety_checker": nothing,
        "scheduler": ["diffusers", configs.scheduler["_class_name"]],
        TEXT_ENCODER: ["transformers", "T5EncoderModel"] if with_text else nothing,
        TOKENIZER: ["transformers", "T5Tokenizer"] if with_text else nothing,
        "unet": ["diffusers", configs.unet["_class_name"]],
        "watermarker": nothing,
    }
    parts = {"unet/config.json": configs.unet, "scheduler/scheduler_config.json": configs.scheduler}
    if configs.noising is not None:
        index["image_noising_scheduler"] = ["diffusers", configs.noising["_class_name"]]
        parts["image_noising_scheduler/scheduler_config.json"] = configs.noising
    _write_json(folder / INDEX, index)
    for name, config in parts.items():
        _write_json(folder / name, {**config, "_diffusers_version": library})


def _write_weights(folder: Path, cascade: Path, entry: Mapping[str, Any], stage: DiffusionMixin) -> None:
    """The U-Net's file; the stage's weights are there while it is written and gone afterwards."""
    module = as_module(stage)
    load_stage_weights(module, cascade, entry, f"stage {entry['name']!r}")
    state = {key.removeprefix("network."): value for key, value in module.state_dict().items()}
    write_tensors(folder / f"{WEIGHTS}.safetensors", to_diffusers(state, describe_args(stage.network)))
    module.to("meta")


def _encoder_files(encoder: T5TextEncoder) -> list[tuple[Path, str]]:
    """(file, folder of the pipeline) of a local encoder's and its tokenizer's files; none for a hub name."""
    folder = Path(encoder.name_or_path).expanduser()
    if not folder.is_dir():
        return []
    place = folder / (encoder.subfolder or "")
    words = folder / encoder.tokenizer_subfolder if encoder.tokenizer_subfolder is not None else place
    weights = sorted(place.glob("model*.safetensors*"))
    if not weights:
        raise InputError(
            f"text encoder {str(place)!r} has no safetensors files to copy; export it by reference, or let "
            "transformers save it anew"
        )
    tokenizer = sorted({file for pattern in TOKENIZER_FILES for file in words.glob(pattern)})
    return [(file, TEXT_ENCODER) for file in [place / "config.json", *weights]] + [
        (file, TOKENIZER) for file in tokenizer
    ]


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _diffusers_version() -> str:
    try:
        return version("diffusers")
    except PackageNotFoundError:
        return OLDEST_DIFFUSERS
