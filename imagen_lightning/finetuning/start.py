"""Where fine-tuning starts: a cascade's stage with its weights, changed as asked and ready to be trained.

An experiment names `imagen_lightning.finetuning.from_cascade` as its model's `class_path`, and writes nothing of the
architecture twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, cast

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

# isort: split
import lightning

from imagen_lightning.cascade.description import build_stage
from imagen_lightning.cascade.manifest import read_manifest
from imagen_lightning.cascade.origin import check_record, descended
from imagen_lightning.cascade.sampling import find_stage
from imagen_lightning.cascade.weights import load_stage_weights, stored_shapes
from imagen_lightning.components import build
from imagen_lightning.diffusion import (
    CosineSchedule,
    FixedVariance,
    LearnedRange,
    LowResAugmentation,
    ShiftedCosineSchedule,
    Thresholding,
    TrainingTimes,
    Weighting,
)
from imagen_lightning.networks import LoRA
from imagen_lightning.stages import DiffusionMixin, Execution, Optimization
from imagen_lightning.text import PseudoTokens
from imagen_lightning.types import InputError, Sampler, Schedule, Spacing, TextEncoder


@dataclass
class SamplingChanges:
    """What of the cascade's sampling is to be another; None keeps the cascade's.

    Attributes:
        sampler, num_steps, guidance, thresholding, spacing, guidance_interval, guidance_rescale: as in `Sampling`.
    """

    sampler: Sampler | None = None
    num_steps: int | None = None
    guidance: float | None = None
    thresholding: Thresholding | None = None
    spacing: Spacing | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float | None = None


def from_cascade(
    cascade: str,
    stage: str = "base",
    adapter: LoRA | None = None,
    tokens: PseudoTokens | None = None,
    text_drop: float | None = None,
    null_text: str | None = None,
    encoder: TextEncoder | None = None,
    optimization: Optimization | None = None,
    sampling: SamplingChanges | None = None,
    weighting: Weighting | None = None,
    times: TrainingTimes | None = None,
    variance: LearnedRange | FixedVariance | None = None,
    schedule: Schedule | None = None,
    image_size: int | None = None,
    low_res_size: int | None = None,
    augmentation: LowResAugmentation | None = None,
    aug_level: float | None = None,
    crop_size: int | None = None,
    recompute: bool | list[bool] | None = None,
    execution: Execution | None = None,
    dtype: str | None = None,
    seed: int = 0,
    trust: list[str] | None = None,
) -> lightning.LightningModule:
    """A stage of a cascade folder with its weights, ready to be trained; None keeps what the cascade has.

    Args:
        cascade: the folder.
        stage: its name or number there.
        adapter: low-rank adapters, trained in place of the weights.
        tokens: new words for the text encoder, trained in place of the weights, or beside an adapter (textual
            inversion); `optimization.train` names more where more is to be trained.
        text_drop: share of captions replaced by the null text in training.
        null_text: "zero" or "empty_caption".
        encoder: the cascade's text encoder set up otherwise, e.g. in another precision; its name and token length must
            be the cascade's.
        optimization: optimizer, learning rates, freezing.
        sampling: what of the default sampling changes.
        weighting, times: of the loss.
        variance: `FixedVariance` leaves a learned variance's channels aside, `LearnedRange` trains them by L_hybrid.
        schedule: of the noise; needed where image_size is another.
        image_size: pixels along a side of the new images.
        low_res_size: of the images that super-resolution takes; None goes with image_size.
        augmentation, aug_level, crop_size: super-resolution only, as in `SuperResolutionStage`; a crop of image_size is
            the whole image.
        recompute: whether activations are computed again in the backward pass instead of kept, as in the network.
        execution: channels-last, torch.compile.
        dtype: "bfloat16" or "float16" for frozen weights in half the memory, beside an adapter; None keeps the files'.
        seed: of training's noise, times, drops, levels and crops.
        trust: packages beside this one whose classes the manifest may name.

    Raises:
        InputError: no such cascade or stage; a change that the stage cannot take; another image_size without a schedule
            for it; another text encoder or token length; another dtype without an adapter.
    """
    path, manifest = read_manifest(cascade)
    entry = manifest["stages"][find_stage([entry["name"] for entry in manifest["stages"]], stage)]
    what = f"stage {entry['name']!r} of {path}"
    arguments = deepcopy(entry["stage"].get("init_args") or {})
    trusted = tuple(trust or ())

    text = _inner(arguments, "text")
    _check_null(null_text, text.get("null_text", "zero"), what)
    if encoder is not None:
        _check_encoder(encoder, build(text.get("encoder"), trusted), what)
    _change(text, drop=text_drop, null_text=null_text, encoder=encoder)
    _change(_inner(arguments, "sampling"), **vars(sampling or SamplingChanges()))
    diffusion = _inner(arguments, "diffusion")
    sizes = _sizes(entry, image_size, low_res_size, what)
    if sizes["image_size"] != entry["image_size"] and schedule is None:
        old = build(diffusion.get("schedule"), trusted)
        raise InputError(_shift(entry["image_size"], image_size or entry["image_size"], old, what))
    _change(diffusion, schedule=schedule, weighting=weighting, times=times, variance=variance)
    only_larger = {"augmentation": augmentation, "aug_level": aug_level, "crop_size": crop_size}
    _check_larger(entry, only_larger, what)
    if recompute is not None:
        network = _inner(arguments, "network")
        if "recompute" not in network:
            raise InputError(f"recompute: the network of {what} cannot compute its activations again; drop it")
        network["recompute"] = recompute
    _change(arguments, **sizes, **only_larger, execution=execution, seed=seed)

    if dtype not in (None, "float32") and adapter is None:
        raise InputError(f"dtype {dtype!r} would lose small updates of weights that are trained; add an adapter")
    stored = stored_shapes(path.parent, entry, what)
    made = build_stage({**entry["stage"], "init_args": arguments}, trusted, what, stored)
    if made.sampling.sampler.needs_variance and not made.process.learns_variance:
        raise InputError(
            f"{what} is sampled with its learned variance, which variance {type(variance).__name__} leaves aside; set "
            "sampling.sampler too, e.g. to imagen_lightning.samplers.DDPM with variance 'small' or 'large'"
        )
    module = cast(lightning.LightningModule, made)
    load_stage_weights(module, path.parent, entry, what, dtype)
    made.origin, made.weights_record = descended(entry, path), check_record(entry["weights"].get("record"), what)
    _choose_trained(made, adapter, tokens, optimization)
    return module.train()


def _choose_trained(
    stage: DiffusionMixin, adapter: LoRA | None, tokens: PseudoTokens | None, optimization: Optimization | None
) -> None:
    """Adds the adapter and the new words, which alone are trained where `optimization.train` does not say otherwise."""
    stage.optimization = optimization or stage.optimization
    if tokens is not None:
        stage.attach_tokens(tokens)
        if stage.optimization.train is None:
            trained = [f"tokens.vectors.{word}" for word in tokens.words] + (["*.lora_*"] if adapter else [])
            stage.optimization = replace(stage.optimization, train=trained)
    if adapter is not None:
        stage.attach_adapter(adapter)
    else:
        stage.optimization.freeze_parameters(cast(lightning.LightningModule, stage))


def _inner(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """The `init_args` of a described part, to be changed in place."""
    return arguments[name].setdefault("init_args", {})


def _change(arguments: dict[str, Any], **values: Any) -> None:
    arguments.update({name: value for name, value in values.items() if value is not None})


def _check_null(given: str | None, old: str, what: str) -> None:
    if given not in (None, old) and "learned" in (given, old):
        raise InputError(f"null_text {given!r}: {what} has {old!r}, and a learned null text is a weight")


def _check_larger(entry: Mapping[str, Any], given: Mapping[str, Any], what: str) -> None:
    """Raises InputError where settings of super-resolution are given to another stage."""
    wrong = [name for name, value in given.items() if value is not None]
    if entry["low_res_size"] is None and wrong:
        raise InputError(f"{wrong[0]} is of super-resolution, and {what} is no such stage; drop it")


def _check_encoder(given: TextEncoder, wanted: TextEncoder | None, what: str) -> None:
    """Raises InputError where the states would not be those that the stage was trained on."""
    if wanted is None:
        raise InputError(f"encoder {given.name!r}: {what} takes no text; drop it")
    for name, mine, theirs in (
        ("text encoder", given.name, wanted.name),
        ("token length", given.max_tokens, wanted.max_tokens),
        ("text features", given.dim, wanted.dim),
    ):
        if mine != theirs:
            raise InputError(f"{name} {mine!r} is not {theirs!r}, which {what} was trained with; give that encoder")


def _sizes(
    entry: Mapping[str, Any], image_size: int | None, low_res_size: int | None, what: str
) -> dict[str, int | None]:
    """The new sizes; an enlargement keeps its factor where only one of them is given."""
    old, old_low = entry["image_size"], entry["low_res_size"]
    new = image_size or old
    _check_larger(entry, {"low_res_size": low_res_size}, what)
    if old_low is None:
        return {"image_size": new}
    if low_res_size is None and new * old_low % old:
        raise InputError(f"image_size {new} does not enlarge as {what} does, {old_low} to {old}; give low_res_size too")
    return {"image_size": new, "low_res_size": low_res_size or new * old_low // old}


def _shift(old: int, new: int, schedule: Schedule, what: str) -> str:
    """What to say of another size without a schedule (Hoogeboom et al. 2023, eq. 6)."""
    shift = 2 * math.log(old / new)
    mend = ""
    if isinstance(schedule, CosineSchedule):
        reference = schedule.reference_size if isinstance(schedule, ShiftedCosineSchedule) else old
        factor = schedule.image_size if isinstance(schedule, ShiftedCosineSchedule) else old
        size = factor * new / old
        size, reference = (round(size), reference) if size == round(size) else (factor * new, reference * old)
        mend = f", here ShiftedCosineSchedule {{image_size: {size}, reference_size: {reference}}}"
    more = "more" if new > old else "less"
    return (
        f"image_size {new} is not the {old} of {what}: an image of {new} px needs {more} noise to hide as much of it, "
        f"2 log({old}/{new}) = {shift:+.2f} in log-SNR; give a schedule for it{mend}, or images of {old} px"
    )
