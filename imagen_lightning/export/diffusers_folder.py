"""A DeepFloyd IF pipeline's folder as diffusers saves it: found, read, checked. JSON and safetensors alone are read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from imagen_lightning.cascade.local import first_line
from imagen_lightning.files import parse_json, read_text
from imagen_lightning.io.yaml import read_yaml
from imagen_lightning.text.hub import first_sentence, reach_hub
from imagen_lightning.types import InputError

INDEX = "model_index.json"
BASE, SUPER_RESOLUTION = "IFPipeline", "IFSuperResolutionPipeline"
STAGE_III = "StableDiffusionUpscalePipeline"
WEIGHTS = "diffusion_pytorch_model"
TEXT_ENCODER, TOKENIZER = "text_encoder", "tokenizer"
SETTINGS = "imagen_lightning.json"  # what diffusers has no place for, written at export
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class PipelineFolder:
    """What a pipeline's folder says, its weights unread.

    Attributes:
        path: the folder.
        source: what it is called: its name on the hub, or the local folder's own name.
        hub_name: the name on the hub, None for a local folder.
        revision: its commit on the hub, None for a local folder.
        kind: IFPipeline or IFSuperResolutionPipeline.
        unet, scheduler: configs.
        noising: config of the image_noising_scheduler; None for IFPipeline.
        weights: the U-Net's safetensors files.
        text_encoder: the config of the text encoder that lies in it, None where none does.
        settings: SETTINGS, where an export wrote it.
    """

    path: Path
    source: str
    hub_name: str | None
    revision: str | None
    kind: str
    unet: dict[str, Any]
    scheduler: dict[str, Any]
    noising: dict[str, Any] | None
    weights: list[Path]
    text_encoder: dict[str, Any] | None
    settings: dict[str, Any] | None

    @property
    def low_res(self) -> bool:
        return self.kind == SUPER_RESOLUTION


def read_pipeline(source: str, variant: str | None = None, revision: str | None = None) -> PipelineFolder:
    """Reads a pipeline of DeepFloyd IF but for its weights.

    Args:
        source: a local folder, or a name on the hub, whose files are then fetched, the text encoder's weights left out.
        variant: "fp16" for `diffusion_pytorch_model.fp16.safetensors`.
        revision: branch, tag or commit on the hub.

    Raises:
        InputError: no such folder or name; a pipeline other than IF's two; files that are missing or damaged, or
            pickles.
    """
    path, hub_name = find_folder(source, variant, revision)
    kind = read_json(path / INDEX).get("_class_name")
    if kind == STAGE_III:
        raise InputError(
            f"{source!r} is {STAGE_III}, IF's stage III: Stable Diffusion's x4 upscaler draws in an autoencoder's "
            "latent space and is no stage of a pixel cascade. Leave it out; a SuperResolutionStage to 1024 px "
            "(experiments/paper/sr_1024.yaml) takes its place"
        )
    if kind not in (BASE, SUPER_RESOLUTION):
        raise InputError(f"{source!r} is a pipeline of {kind!r}; {BASE} and {SUPER_RESOLUTION} can be imported")
    encoder = path / TEXT_ENCODER / "config.json"
    settings = path / SETTINGS
    return PipelineFolder(
        path=path,
        source=hub_name or path.resolve().name,
        hub_name=hub_name,
        revision=path.name if hub_name else None,
        kind=kind,
        unet=read_json(path / "unet" / "config.json"),
        scheduler=read_json(path / "scheduler" / "scheduler_config.json"),
        noising=read_json(path / "image_noising_scheduler" / "scheduler_config.json")
        if kind == SUPER_RESOLUTION
        else None,
        weights=_weight_files(path / "unet", variant),
        text_encoder=read_json(encoder) if encoder.is_file() else None,
        settings=read_json(settings) if settings.is_file() else None,
    )


def find_folder(source: str, variant: str | None, revision: str | None) -> tuple[Path, str | None]:
    """The local folder and, where it was fetched from the hub, its name there."""
    path = Path(source).expanduser()
    if (path / INDEX).is_file():
        return path, None
    if path.exists() or not _HUB_NAME.fullmatch(source):
        what = "has no model_index.json" if path.is_dir() else "is no folder"
        raise InputError(f"{source!r} {what}; give a folder that diffusers' save_pretrained wrote, or a hub name")
    return _fetch(source, variant, revision), source


def _fetch(name: str, variant: str | None, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    weights = f"unet/{WEIGHTS}.{variant}" if variant else f"unet/{WEIGHTS}"
    patterns = [INDEX, SETTINGS, "*/*.json", f"{weights}.safetensors", f"{weights}-*.safetensors", "tokenizer/*"]
    patterns += ["README.md", "LICEN[CS]E*"]
    try:
        try:
            reach_hub(name, "unet", revision)
        except OSError:
            return Path(snapshot_download(name, revision=revision, local_files_only=True))
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=["*.bin", "*.ckpt"])
        )
    except Exception as error:  # the class is that of whichever HTTP client the hub's library uses
        raise InputError(
            f"{name!r} is no local folder and cannot be had from the cache or from Hugging Face: check the name and "
            f"the network, or give a local folder ({first_sentence(error)})"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: no such file, or something else in it.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{str(path)!r} is missing ({first_line(error)}); copy the whole pipeline") from error
    except ValueError as error:
        raise InputError(f"{str(path)!r} is damaged ({first_line(error)}); copy the pipeline again") from error
    if not isinstance(content, dict):
        raise InputError(f"{str(path)!r} is damaged: it is no JSON object; copy the pipeline again")
    return content


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The U-Net's files: one, or the shards that an index names."""
    part = f".{variant}" if variant else ""
    single = folder / f"{WEIGHTS}{part}.safetensors"
    if single.is_file():
        return [single]
    for ending in ("safetensors.index{}.json", "safetensors{}.index.json"):  # diffusers has had both
        index = f"{WEIGHTS}.{ending.format(part)}"
        if (folder / index).is_file():
            return _shards(folder, index)
    there = sorted(file.name for file in folder.glob(f"{WEIGHTS}*"))
    safe = [name for name in there if name.endswith(".safetensors") and "-of-" not in name]
    if safe:
        others = sorted({name.removeprefix(WEIGHTS).removesuffix(".safetensors").strip(".") for name in safe})
        mend = ", ".join(f"--variant {name}" if name else "no --variant" for name in others)
        raise InputError(f"{str(folder)!r} has no {single.name}; there is {', '.join(safe)}: use {mend}")
    pickles = [name for name in there if name.endswith((".bin", ".pt", ".ckpt"))]
    if pickles:
        raise InputError(
            f"{str(folder)!r} has weights as {', '.join(pickles[:3])} alone: pickles, which can run code and are never "
            "read. Let diffusers save the pipeline anew, with save_pretrained(FOLDER, safe_serialization=True)"
        )
    raise InputError(f"{str(folder)!r} has no weights: {single.name} is missing; copy the whole pipeline")


def _shards(folder: Path, index: str) -> list[Path]:
    names = read_json(folder / index).get("weight_map")
    if not isinstance(names, Mapping) or not names:
        raise InputError(f"{str(folder / index)!r} is damaged: it has no weight_map; copy the pipeline again")
    files = []
    for name in dict.fromkeys(names.values()):
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{str(folder / index)!r} names {name!r}; it must name .safetensors files beside it")
        if not (folder / name).is_file():
            raise InputError(f"{str(folder / name)!r}, which {index} names, is missing; copy the whole pipeline")
        files.append(folder / name)
    return files


def tensor_shapes(files: Sequence[Path]) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """The file and the shape of each tensor of several safetensors files.

    Raises:
        InputError: a file is damaged.
    """
    return {key: (path, shape) for path in files for key, shape in _shapes(path).items()}


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"weights {str(path)!r} are damaged ({first_line(error)}); copy them again") from error


# ---- licence


def read_licence(folder: Path) -> dict[str, str]:
    """What a model card's header and a LICENSE file say of the licence: licence, licence_link, licence_text."""
    found: dict[str, str] = {}
    card = folder / "README.md"
    header = re.match(r"---\n(.*?)\n---", read_text(card, "model card"), re.DOTALL) if card.is_file() else None
    if header:
        said = read_yaml(header[1], f"the header of {str(card)!r}")
        said = said if isinstance(said, dict) else {}
        name = said.get("license_name") if said.get("license") in (None, "other") else None
        licences = name or said.get("license")
        if licences:
            found["licence"] = ", ".join(map(str, licences)) if isinstance(licences, list) else str(licences)
        if said.get("license_link"):
            found["licence_link"] = str(said["license_link"])
    for file in sorted([*folder.glob("LICENSE*"), *folder.glob("LICENCE*")])[:1]:
        found["licence_text"] = file.read_text(encoding="utf-8", errors="replace")
    return found
