"""Settings and inputs of a cascade's sampling, and their checks."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from imagen_lightning import samplers
from imagen_lightning.cascade.description import low_res_size, model_description, sampling_description, stage_name
from imagen_lightning.components import describe, in_words
from imagen_lightning.images import downsample, from_pil, to_float, to_uint8
from imagen_lightning.stages import DiffusionMixin
from imagen_lightning.types import InputError, Sampler


@dataclass(frozen=True)
class StageSettings:
    """All that decides an image of a stage, but for its weights, its input and its noise.

    Caches, protocols, `samples.json`, class images and plans hold it as `described` gives it. What `Sampling` and the
    stage's arguments hold is found from the objects themselves, so that a new setting is included.

    Attributes:
        stage: its name, "base" or "sr_256".
        sampler: the algorithm.
        steps: along the time.
        guidance: classifier-free guidance weight.
        aug_level: noise on the low-resolution image, None for a base stage.
        sampling: the other settings of `Sampling`, as plain data: spacing, thresholding, …
        model: what the stage is, as plain data: class, sizes, network, text, diffusion, …
    """

    stage: str
    sampler: Sampler
    steps: int
    guidance: float
    aug_level: float | None
    sampling: Mapping[str, Any]
    model: Mapping[str, Any]

    def described(self) -> dict[str, Any]:
        """Return the settings as plain data; equal settings (2 and 2.0) give equal data."""
        described: dict[str, Any] = _with_whole_numbers({**vars(self), "sampler": describe(self.sampler)})
        return described


def protocol_fields(described: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how stages made images as fields of a `imagen_lightning.metrics.protocol.Protocol`.

    Each is one value, or for several stages one a stage; None where a stage has no such setting.

    Args:
        described: the stages' settings, as `StageSettings.described` gives them; records of samples that were made
            before these held all say nothing of the rest.
    """
    rows = [
        {
            **{name: stage[name] for name in ("guidance", "steps", "aug_level")},
            "sampler": in_words(stage["sampler"]),
            "sampling": {name: in_words(value) for name, value in stage.get("sampling", {}).items()},
            "process": dict(_process(stage.get("model", {}))),
        }
        for stage in described
    ]
    return {name: _each([row[name] for row in rows]) for name in rows[0]}


def _each(values: list[Any]) -> Any:
    if len(values) == 1:
        return values[0]
    if isinstance(values[0], dict):
        names = dict.fromkeys(name for value in values for name in value)
        return {name: [value.get(name) for value in values] for name in names}
    return values


def _process(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a model's settings in words by name, without its network and sizes; groups of settings one by one."""
    for name, value in model.get("init_args", {}).items():
        if name in ("network", "image_size", "low_res_size"):
            continue
        if isinstance(value, Mapping) and str(value.get("class_path")).startswith("imagen_lightning.stages."):
            yield from ((f"{name}.{key}", in_words(item)) for key, item in value["init_args"].items())
        else:
            yield name, in_words(value)


def _with_whole_numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass(frozen=True)
class Samples:
    """What a cascade drew.

    Attributes:
        images: (B, 3, H, W) uint8 of the last stage, on the CPU.
        stages: the same of every stage that ran, in order.
        settings: of every stage that ran.
    """

    images: Tensor
    stages: list[Tensor]
    settings: list[StageSettings]


def sampler_names() -> list[str]:
    """The samplers of `imagen_lightning.samplers` by the names that `find_sampler` knows them by."""
    return sorted(_samplers())


def find_sampler(name: str) -> Sampler:
    """A sampler with its default settings by its class's name, in any case, "solver" and punctuation left out or not.

    "ddim" is DDIM; "dpmpp", "DPM-Solver++" and "DPMSolverPP" are DPMSolverPP.

    Raises:
        InputError: there is none; the message lists those there are.
    """
    found = _samplers().get(_plain(name))
    if found is None:
        raise InputError(f"sampler {name!r} is unknown; use one of {', '.join(sampler_names())}")
    return found()


def _samplers() -> dict[str, Callable[[], Sampler]]:
    exported = [getattr(samplers, name) for name in samplers.__all__]
    return {_plain(cls.__name__): cls for cls in exported if issubclass(cls, Sampler)}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "p")).replace("solver", "")


def settings_of(
    stage: DiffusionMixin, guidance: Any, steps: Any, sampler: Any, aug_level: float | None
) -> StageSettings:
    name, defaults = stage_name(stage), stage.sampling
    guidance = defaults.guidance if guidance is None else guidance
    if not _is_number(guidance):
        raise InputError(f"guidance {guidance!r} of stage {name!r} is not a finite number")
    steps = defaults.num_steps if steps is None else steps
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise InputError(f"steps {steps!r} of stage {name!r} must be a whole number of at least 1")
    sampler = defaults.sampler if sampler is None else sampler
    if isinstance(sampler, str):
        sampler = find_sampler(sampler)
    if not callable(sampler):
        raise InputError(f"sampler {sampler!r} of stage {name!r} is no sampler; use {', '.join(sampler_names())}")
    if low_res_size(stage) is None:
        aug_level = None
    else:
        highest = stage.augmentation.max_level  # type: ignore[attr-defined]
        aug_level = stage.aug_level if aug_level is None else aug_level  # type: ignore[attr-defined]
        if not _is_number(aug_level) or not 0 <= aug_level <= highest:  # type: ignore[operator]
            raise InputError(f"aug_level {aug_level!r} of stage {name!r} must be in [0, {highest:g}], as in training")
    return StageSettings(
        name, sampler, steps, guidance, aug_level, sampling_description(stage), model_description(stage)
    )


def text_identity(stage: DiffusionMixin) -> dict[str, str] | None:
    """Return what tells the states of the stage's text encoder from another's, None for a stage without text.

    Weights that are not at hand yet are fetched, so that their digest is the same now and later.
    """
    encoder = stage.text.encoder
    if encoder is None:
        return None
    found = encoder.identity()
    if found.get("weights") == "":
        encoder([""])
        found = encoder.identity()
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def image_seeds(seed: int | Sequence[int], count: int, first_index: int) -> list[tuple[int, int]]:
    """Return (seed, index) of each image; an image with a seed of its own has index 0.

    Raises:
        InputError: another number of seeds, or one that is not a whole number in [0, 2^63): noise takes 64 bits.
    """
    if isinstance(seed, int) or not hasattr(seed, "__len__"):
        return [(_checked_seed(seed), first_index + i) for i in range(count)]
    if len(seed) != count:
        raise InputError(f"{len(seed)} seeds for {count} captions; give one, or one a caption")
    return [(_checked_seed(own), 0) for own in seed]


def _checked_seed(seed: Any) -> int:
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < 2**63:
        raise InputError(f"seed {seed!r} is not a whole number in [0, 2^63)")
    return number


def fit_image(image: Image.Image | Tensor, size: int, stage: str) -> Tensor:
    """One image to uint8 (3, size, size)."""
    pixels = from_pil(image) if isinstance(image, Image.Image) else image
    if pixels.dim() != 3 or pixels.shape[0] != 3:
        raise InputError(f"images for stage {stage!r} must be (B, 3, h, w); one of them is {tuple(pixels.shape)}")
    height, width = pixels.shape[1:]
    if height != width or height < size:
        raise InputError(
            f"images of {width}x{height} px given to stage {stage!r}, which takes {size}x{size}: give square ones of "
            f"that size or larger"
        )
    if pixels.dtype == torch.uint8:
        if height == size:
            return pixels.cpu()
        pixels = to_float(pixels)
    elif not pixels.is_floating_point() or not bool((pixels.abs() <= 1.001).all()):
        raise InputError(f"images for stage {stage!r} must be uint8, or floats in [-1, 1]")
    return to_uint8(downsample(pixels[None].float(), size)[0]).cpu()


def find_stage(names: Sequence[str], stage: int | str) -> int:
    """The place of a stage given by name or number (also as a string)."""
    if isinstance(stage, str) and stage in names:
        return names.index(stage)
    if (isinstance(stage, int) or (stage.isdecimal() and len(stage) < 10)) and 0 <= int(stage) < len(names):
        return int(stage)
    known = ", ".join(f"{number} ({name})" for number, name in enumerate(names))
    raise InputError(f"stage {stage!r} is unknown; the cascade has {known}")


def negatives_of(
    negative: str | Sequence[str] | None, count: int, settings: Sequence[StageSettings]
) -> list[str] | None:
    """The negative captions, one an image, None for none."""
    if negative is None:
        return None
    negatives = [negative] * count if isinstance(negative, str) else list(negative)
    if len(negatives) != count:
        raise InputError(f"{len(negatives)} negative captions for {count} captions; give one, or one an image")
    if all(setting.guidance == 1 for setting in settings):
        raise InputError("negative captions act through guidance, which is 1 in every stage; set another guidance")
    return negatives


def low_res_images(
    stage: DiffusionMixin, images: Tensor | Sequence[Image.Image | Tensor] | None, count: int
) -> Tensor | None:
    """(count, 3, h, w) uint8 at the size that the first stage to run takes, None where it takes nothing."""
    size, name = low_res_size(stage), stage_name(stage)
    if size is None:
        if images is not None:
            raise InputError(f"stage {name!r} starts from text alone; drop images, or set start_stage beyond it")
        return None
    if images is None:
        raise InputError(f"stage {name!r} starts from low-resolution images of {size} px; give images")
    if len(images) != count:
        raise InputError(f"{len(images)} images for {count} captions; give one a caption")
    return torch.stack([fit_image(image, size, name) for image in images])


def check_words(stages: Sequence[DiffusionMixin], running: Sequence[DiffusionMixin], captions: Iterable[str]) -> None:
    """Raises InputError where a caption has a pseudo-word that some stage knows and one that is to run does not."""
    readers = [stage for stage in stages if stage.text.tokens is not None]
    for caption in dict.fromkeys(captions) if readers else ():
        for stage in running:
            if stage.text.encoder is None:
                continue
            for other in readers:
                _check_caption(caption, stage, other)


def _check_caption(caption: str, stage: DiffusionMixin, other: DiffusionMixin) -> None:
    assert other.text.tokens is not None
    mine = stage.text.tokens.known(caption) if stage.text.tokens is not None else []
    for word in other.text.tokens.known(caption):
        if word.casefold() not in map(str.casefold, mine):
            raise InputError(
                f"caption {caption!r}: stage {stage_name(stage)!r} does not know the pseudo-word {word!r}, which stage "
                f"{stage_name(other)!r} knows; give it to both: `imagen-lightning tokens` writes its file, and "
                "`imagen-lightning cascade … --tokens FILE` reads it"
            )
