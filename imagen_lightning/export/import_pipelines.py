"""DeepFloyd IF's pipelines, as diffusers saves them, to a cascade."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from imagen_lightning.cascade import Cascade
from imagen_lightning.cascade.description import as_module, build_stage, share_encoders, without_weights
from imagen_lightning.cascade.origin import check_origin, check_record
from imagen_lightning.cascade.weights import check_finite, find_dtype, put_tensors
from imagen_lightning.components import describe
from imagen_lightning.diffusion import LowResAugmentation
from imagen_lightning.export.diffusers_folder import (
    INDEX,
    TEXT_ENCODER,
    TOKENIZER,
    PipelineFolder,
    read_licence,
    read_pipeline,
    tensor_shapes,
)
from imagen_lightning.export.diffusers_scheduler import read_noising, read_scheduler
from imagen_lightning.export.diffusers_unet import names, unet_arguments
from imagen_lightning.export.export_stage import SETTINGS_FORMAT, describes
from imagen_lightning.networks import UNet
from imagen_lightning.stages import BaseStage, Diffusion, DiffusionMixin, Sampling, SuperResolutionStage, TextSettings
from imagen_lightning.text import T5TextEncoder
from imagen_lightning.types import InputError

MAX_TOKENS = 77  # of IF's text; the pipelines know no other length
AUG_LEVEL = 0.25  # the pipelines' noise_level 250
# Steps and guidance that the pipelines have where none are given.
BASE_SAMPLING, SUPER_RESOLUTION_SAMPLING = (100, 7.0), (50, 4.0)


def import_pipelines(
    sources: Sequence[str | Path],
    text_encoder: str | Path | None = None,
    dtype: str | None = None,
    text_dtype: str = "float32",
    variant: str | None = None,
    revision: str | None = None,
    low_res_size: int | None = None,
) -> Cascade:
    """A cascade of one or more pipelines' stages, its weights those of the files.

    Nothing but JSON and safetensors is read and no code of the files' authors is run. The weights are mapped from the
    files: only tensors that change (their type, or in being joined) are copied.

    Args:
        sources: of stage I and stages II in order, or of either alone: local folders or names on the hub.
        text_encoder: in place of the pipelines' own encoder: a folder or hub name of a T5 with its tokenizer, or a
            pipeline's folder.
        dtype: "float32", "bfloat16" or "float16", to which the weights are cast; None keeps them as they are.
        text_dtype: in which the text encoder is held.
        variant: of the U-Nets' files, e.g. "fp16".
        revision: branch, tag or commit of names on the hub.
        low_res_size: pixels of the image that the first source is given, where that is a stage II; None for a quarter.

    Raises:
        InputError: a pipeline that is missing, damaged, none of IF's, or that the stages here cannot be; weights,
            text encoder or sizes that do not fit.
    """
    find_dtype(dtype)
    folders = [read_pipeline(str(source), variant, revision) for source in sources]
    stages: list[DiffusionMixin] = []
    encoder: T5TextEncoder | None = None
    for folder in folders:
        encoder = _encoder(folder, encoder, text_encoder, text_dtype)
        size = stages[-1].image_size if stages else low_res_size
        stages.append(_stage(folder, encoder, size))
    cascade = Cascade(share_encoders(stages))
    for folder, stage in zip(folders, stages):
        stage.weights_record = stage.weights_record or {"kind": "imported", "format": "diffusers"}
        put_tensors(as_module(stage), dict(_tensors(folder, stage, find_dtype(dtype))))
    return cascade


# ---- a stage


def _stage(folder: PipelineFolder, encoder: T5TextEncoder, low_res_size: int | None) -> DiffusionMixin:
    """The stage without its weights."""
    where = folder.path / "unet" / "config.json"
    arguments = _arguments(folder)
    _check_width(folder, encoder, arguments)
    described = _described(folder, encoder)
    if described is not None:
        return described
    size = folder.unet.get("sample_size")
    if not isinstance(size, int):
        raise InputError(f"{str(where)!r} has sample_size {size!r}; it must be the pixels along a side of the images")
    given = read_scheduler(folder.scheduler, f"the scheduler of {folder.source!r}")
    text = TextSettings(encoder, null_text="empty_caption")
    diffusion = Diffusion(given.schedule, given.parametrization, variance=given.variance)
    steps, guidance = SUPER_RESOLUTION_SAMPLING if folder.low_res else BASE_SAMPLING
    sampling = Sampling(given.sampler, steps, guidance, given.thresholding, given.spacing)
    stage: DiffusionMixin
    with without_weights():
        network = UNet(**arguments)
        if folder.noising is None:
            stage = BaseStage(size, network, text, diffusion, sampling)
        else:
            noising = read_noising(folder.noising, f"the image_noising_scheduler of {folder.source!r}")
            stage = SuperResolutionStage(
                size,
                low_res_size or size // 4,
                network,
                text,
                diffusion,
                LowResAugmentation(noising),
                AUG_LEVEL,
                sampling=sampling,
                upsampling="bilinear_aligned",
            )
    as_module(stage).eval()
    stage.origin = _origin(folder)
    return stage


def _arguments(folder: PipelineFolder) -> dict[str, Any]:
    """The U-Net's arguments, those that the pipeline's kind needs checked."""
    try:
        arguments = unet_arguments(folder.unet)
    except InputError as error:
        raise InputError(f"{folder.source!r}: {error}") from error
    if arguments["low_res"] != folder.low_res:
        kind = "takes" if arguments["low_res"] else "takes no"
        raise InputError(f"{folder.source!r} is an {folder.kind}, but the U-Net of its config {kind} low-res image")
    if (arguments["channels"], arguments["out_channels"]) != (3, 6):
        raise InputError(
            f"{folder.source!r}: the U-Net of its config takes images of {arguments['channels']} channels and gives "
            f"{arguments['out_channels']}; {folder.kind} has 3, and gives 3 and 3 of the variance"
        )
    return arguments


def _described(folder: PipelineFolder, encoder: T5TextEncoder) -> DiffusionMixin | None:
    """The stage that an export wrote down beside the configs, where it is still that of the configs."""
    settings = folder.settings
    if settings is None:
        return None
    what = f"the stage of {folder.source!r}"
    if settings.get("format") != SETTINGS_FORMAT or not isinstance(settings.get("stage"), dict):
        raise InputError(f"{what} is described in no {SETTINGS_FORMAT!r}; remove that file or write it anew")
    description = copy.deepcopy(settings["stage"])
    _argument(description, "text")["encoder"] = describe(encoder)
    stage = build_stage(description, (), what, [shape for _, shape in tensor_shapes(folder.weights).values()])
    if not describes(stage, folder):
        return None
    stage.origin = check_origin(settings.get("origin"), what)
    stage.weights_record = check_record(settings.get("weights_record"), what)
    return stage


def _origin(folder: PipelineFolder) -> dict[str, Any]:
    return {
        "source": folder.source,
        "revision": folder.revision,
        "format": "diffusers",
        "pipeline": folder.kind,
        **read_licence(folder.path),
    }


# ---- text


def _encoder(
    folder: PipelineFolder, before: T5TextEncoder | None, given: str | Path | None, dtype: str
) -> T5TextEncoder:
    """The encoder that was asked for, the pipeline's own, that of the stage before, or the one an export named."""
    settings: dict[str, Any] = {
        "max_tokens": MAX_TOKENS,
        "dtype": dtype,
        "clean_captions": "lowercase",
        "padding": "attended",
    }
    inside: dict[str, Any] = {"subfolder": TEXT_ENCODER, "tokenizer_subfolder": TOKENIZER}
    if given is not None:
        local = Path(given).expanduser()
        place = str(local.resolve()) if local.exists() else str(given)
        return T5TextEncoder(place, **settings, **(inside if (local / INDEX).is_file() else {}))
    if folder.text_encoder is not None:
        place = folder.hub_name or str(folder.path.resolve())
        own = T5TextEncoder(place, revision=folder.revision, **settings, **inside)
        return own if before is None or not _same(own, before) else before
    if before is not None:
        return before
    named = _named_encoder(folder.settings)
    if named is None:
        raise InputError(
            f"{folder.source!r} holds no text encoder; name one: --text-encoder google/t5-v1_1-xxl, a folder, or the "
            "pipeline of stage I"
        )
    return T5TextEncoder(**named)


def _same(own: T5TextEncoder, other: T5TextEncoder) -> bool:
    one, two = own.identity(), other.identity()
    return one["weights"] != "" and all(one[key] == two[key] for key in one if key != "encoder")


def _named_encoder(settings: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The arguments of the encoder that an export named."""
    if settings is None:
        return None
    named = _argument(_argument(settings.get("stage"), "text", whole=True), "encoder")
    return named if "name_or_path" in named else None


def _argument(description: Any, name: str, whole: bool = False) -> Any:
    """An argument of a described object: the argument's own arguments, or with `whole` its description; {} for none."""
    arguments = description.get("init_args") if isinstance(description, Mapping) else None
    found = arguments.get(name) if isinstance(arguments, Mapping) else None
    if not isinstance(found, dict):
        return {}
    return found if whole else found.get("init_args", {})


def _check_width(folder: PipelineFolder, encoder: T5TextEncoder, arguments: Mapping[str, Any]) -> None:
    """Raises InputError where the text encoder's features are not those that the U-Net takes."""
    wanted, found = arguments["text_dim"], encoder.dim
    if wanted != found:
        raise InputError(
            f"the U-Net of {folder.source!r} takes text of {wanted} features, but text encoder {encoder.name!r} gives "
            f"{found}; give the encoder that it was trained with: --text-encoder"
        )


# ---- weights


def _tensors(folder: PipelineFolder, stage: DiffusionMixin, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """The stage's tensors from the U-Net's files, which are checked before the first is read."""
    table = names(unet_arguments(folder.unet))
    found = tensor_shapes(folder.weights)
    _check_tensors(folder, stage, table, found)
    files = {path: safe_open(path, framework="pt") for path in folder.weights}
    for ours, theirs in table.items():
        parts = [files[found[name][0]].get_tensor(name) for name in theirs]
        value = torch.cat(parts) if len(parts) > 1 else parts[0]
        if not value.is_floating_point():
            raise InputError(f"weights of {folder.source!r}: {theirs[0]!r} is of {value.dtype}; save them as float32")
        check_finite(theirs[0], value, repr(folder.source))
        yield f"network.{ours}", value.to(dtype)


def _check_tensors(
    folder: PipelineFolder,
    stage: DiffusionMixin,
    table: Mapping[str, list[str]],
    found: Mapping[str, tuple[Path, tuple[int, ...]]],
) -> None:
    wanted = {name for parts in table.values() for name in parts}
    where = f"the weights of {folder.source!r}"
    for problem, rest in (("lack", wanted - found.keys()), ("have, beyond the U-Net's,", found.keys() - wanted)):
        if rest:
            raise InputError(f"{where} {problem} {_some(rest)}: they are not those of unet/config.json")
    shapes = {key: tuple(value.shape) for key, value in as_module(stage).state_dict().items()}
    for ours, theirs in table.items():
        height, *others = shapes[f"network.{ours}"]
        for name in theirs:
            expected = (height // len(theirs), *others)
            if found[name][1] != expected:
                raise InputError(
                    f"{where}: {name!r} has shape {found[name][1]} in {found[name][0].name}, but unet/config.json "
                    f"makes it {expected}"
                )


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 1} more" if len(listed) > 1 else ""
    return f"{listed[0]!r}{more}"
