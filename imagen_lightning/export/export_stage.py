"""What diffusers' files say of a stage, or why they cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from imagen_lightning.cascade.description import stage_name
from imagen_lightning.components import class_path, describe_args
from imagen_lightning.export.diffusers_folder import BASE, SUPER_RESOLUTION, PipelineFolder
from imagen_lightning.export.diffusers_scheduler import noising_config, same_scheduler, scheduler_config
from imagen_lightning.export.diffusers_unet import unet_arguments, unet_config
from imagen_lightning.networks import UNet
from imagen_lightning.stages import BaseStage, DiffusionMixin, SuperResolutionStage
from imagen_lightning.text import T5TextEncoder
from imagen_lightning.types import InputError

SETTINGS_FORMAT = "imagen-lightning stage"
# What IF's pipelines do with text, whatever their files say.
TEXT: dict[str, Any] = {"max_tokens": 77, "padding": "attended", "clean_captions": "lowercase"}


@dataclass(frozen=True)
class StageConfigs:
    """The configs of a stage's pipeline."""

    kind: str
    unet: dict[str, Any]
    scheduler: dict[str, Any]
    noising: dict[str, Any] | None


def stage_configs(stage: DiffusionMixin) -> StageConfigs:
    """The configs of the pipeline that draws as the stage does.

    Raises:
        InputError: DeepFloyd IF's pipelines cannot be the stage; all that they cannot be is named.
    """
    scheduler, wrong = scheduler_config(stage.diffusion, stage.sampling)  # type: ignore[attr-defined]
    unet, noising = {}, None
    if not isinstance(stage, BaseStage | SuperResolutionStage):
        wrong.append(f"stage {class_path(stage)} (BaseStage or SuperResolutionStage)")
    if stage.adapter is not None:
        wrong.append("adapter (merge it: imagen-lightning cascade)")
    if isinstance(stage.network, UNet):
        try:
            unet = unet_config(describe_args(stage.network), stage.image_size)
        except InputError as error:
            wrong.append(str(error))
    else:
        wrong.append(f"network {type(stage.network).__name__} (UNet)")
    wrong += _unread_text(stage)
    if isinstance(stage, SuperResolutionStage):
        noising, problems = noising_config(stage.augmentation.schedule)
        wrong += problems
        if stage.upsampling != "bilinear_aligned":
            wrong.append(f"upsampling {stage.upsampling!r} ('bilinear_aligned')")
        step = 1000 * stage.aug_level
        if abs(step - round(step)) > 1e-6:
            wrong.append(f"aug_level {stage.aug_level} (a whole noise_level of 1000)")
    if wrong:
        raise InputError(
            f"stage {stage_name(stage)!r} cannot be a pipeline of DeepFloyd IF in diffusers: {'; '.join(wrong)}"
        )
    return StageConfigs(BASE if noising is None else SUPER_RESOLUTION, unet, scheduler, noising)


def _unread_text(stage: DiffusionMixin) -> list[str]:
    text = stage.text
    if not isinstance(text.encoder, T5TextEncoder):
        return [f"text encoder {type(text.encoder).__name__} (T5TextEncoder)"]
    wrong = [
        f"text encoder's {key} {getattr(text.encoder, key)!r} ({value!r})"
        for key, value in TEXT.items()
        if getattr(text.encoder, key) != value
    ]
    if text.network is not None:
        wrong.append(f"text network {type(text.network).__name__} (null)")
    if text.tokens is not None:
        wrong.append("text tokens (null: a pipeline has no words of its own)")
    if text.null_text != "empty_caption":
        wrong.append(f"null_text {text.null_text!r} ('empty_caption')")
    return wrong


def describes(stage: DiffusionMixin, folder: PipelineFolder) -> bool:
    """Whether the folder's configs are those of the stage."""
    try:
        own = stage_configs(stage)
        same_unet = unet_arguments(own.unet) == unet_arguments(folder.unet)
    except InputError:
        return False
    return (
        own.kind == folder.kind
        and same_unet
        and own.unet["sample_size"] == folder.unet.get("sample_size")
        and same_scheduler(own.scheduler, folder.scheduler)
        and (own.noising is None or same_scheduler(own.noising, folder.noising or {}))
    )
