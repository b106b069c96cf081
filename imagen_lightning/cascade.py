"""Trained stages in a row: a cascade is sampled, saved to a folder, and loaded from one.

A cascade folder holds `cascade.json`, the manifest, and one safetensors file of weights a stage. It is made from
Lightning checkpoints, of which plain data and tensors alone are read. Nothing here unpickles, and a manifest can only
name classes of this package or of packages that the caller trusts by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from imagen_lightning import __version__, samplers
from imagen_lightning.components import build, class_path, describe, find_class
from imagen_lightning.diffusion.random import seeded_generator
from imagen_lightning.images import downsample, from_pil, to_float, to_uint8
from imagen_lightning.stages import DiffusionMixin
from imagen_lightning.types import InputError, Sampler, TextEncoder

MANIFEST = "cascade.json"
FORMAT = "imagen-lightning cascade"
VERSION = 1
VALUE_RANGE = [-1.0, 1.0]
RESIZE = {"down": "area", "up": "bilinear"}

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class StageSettings:
    """How one stage was sampled.

    Attributes:
        stage: its name, "base" or "sr_256".
        sampler: the algorithm.
        steps: along the time.
        guidance: classifier-free guidance weight.
        aug_level: noise on the low-resolution image, None for a base stage.
    """

    stage: str
    sampler: Sampler
    steps: int
    guidance: float
    aug_level: float | None

    def described(self) -> dict[str, Any]:
        """The settings as plain data."""
        return {**vars(self), "sampler": describe(self.sampler)}


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


class Cascade:
    """Stages in order, each at the size that the next one takes.

    The first may be a super-resolution stage; sampling then starts from given images.

    Args:
        stages: a base stage and super-resolution stages, or the latter alone.
        metrics: results of evaluations with their protocols, plain data kept in the manifest.

    Raises:
        InputError: no stages, or sizes that do not chain.
    """

    def __init__(self, stages: Sequence[DiffusionMixin], metrics: Iterable[Mapping[str, Any]] = ()) -> None:
        self.stages = list(stages)
        self.metrics = [dict(metric) for metric in metrics]
        if not self.stages:
            raise InputError("a cascade needs at least one stage")
        for before, stage in zip(self.stages, self.stages[1:]):
            taken = _low_res_size(stage)
            if taken is None:
                raise InputError(
                    f"stage {_name(stage)!r} of {stage.image_size} px takes no low-resolution image but follows stage "
                    f"{_name(before)!r} of {before.image_size} px; put it first"
                )
            if taken != before.image_size:
                raise InputError(
                    f"stage {_name(stage)!r} takes images of {taken} px but stage {_name(before)!r} before it makes "
                    f"{before.image_size} px; order the stages by size and let each take what the last one makes"
                )

    @property
    def names(self) -> list[str]:
        """The stages' names: "base", and "sr_256" for super-resolution to 256 px."""
        return [_name(stage) for stage in self.stages]

    @property
    def device(self) -> torch.device:
        return next(_module(self.stages[-1]).parameters()).device

    def to(self, device: torch.device | str) -> Cascade:
        """Moves every stage and returns the cascade.

        Raises:
            InputError: no such device on this machine.
        """
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise InputError(f"device {str(device)!r} cannot be used here ({_line(error)}); try cpu") from error
        for stage in self.stages:
            _module(stage).to(device)
        return self

    def describe(self) -> str:
        """One line a stage for people: size, parameters, text, default sampling."""
        lines = []
        for stage in self.stages:
            summary = _summary(stage)
            low, text, sampling = summary["low_res_size"], summary["text"], summary["sampling"]
            lines.append(
                f"{summary['name']}: {f'{low} -> ' if low else ''}{stage.image_size} px, "
                f"{_num_parameters(stage) / 1e6:.1f}M parameters, "
                + (f"text {text['encoder']} ({text['max_tokens']} tokens)" if text else "no text")
                + f", {type(stage.sampling.sampler).__name__} {sampling['num_steps']} steps, "
                f"guidance {sampling['guidance']:g}" + (f", aug level {summary['aug_level']:g}" if low else "")
            )
        return "\n".join(lines)

    # ---- making, saving, loading

    @classmethod
    def from_checkpoints(cls, paths: Sequence[str | Path], trust: Iterable[str] = ()) -> Cascade:
        """Joins trained stages, on the CPU, from Lightning checkpoints or run folders, in the cascade's order.

        The weights are those in the checkpoint's state_dict: averaged where the run averaged them.

        Args:
            paths: local files, or run folders, whose checkpoint of the latest step (else last.ckpt) is taken.
            trust: packages beside this one whose classes the checkpoints may name.

        Raises:
            InputError: an address on the network; a file that is missing, empty, damaged, or no stage's checkpoint;
                a class of a package that is not trusted; weights that do not fit; sizes that do not chain.
        """
        return cls(_share_encoders([_stage_from_checkpoint(path, _names(trust)) for path in paths]))

    def save(self, folder: str | Path) -> None:
        """Writes the manifest and the weights to a new or empty folder, whole or not at all.

        Raises:
            InputError: the folder holds something or cannot be written, or a stage cannot be described as plain data.
        """
        entries = [
            {
                **_summary(stage),
                "stage": {"class_path": class_path(stage), "init_args": stage.hyperparameters()},
                "weights": {"file": f"{_name(stage)}.safetensors", "num_parameters": _num_parameters(stage)},
            }
            for stage in self.stages
        ]
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "created_with": {"imagen_lightning": __version__, "torch": torch.__version__},
            "value_range": VALUE_RANGE,
            "resize": RESIZE,
            "stages": entries,
            "metrics": self.metrics,
        }
        with whole_folder(folder) as partial:
            for entry, stage in zip(entries, self.stages):
                path = partial / entry["weights"]["file"]
                # clone: safetensors refuses tensors that share memory
                tensors = {key: value.detach().cpu().clone() for key, value in _module(stage).state_dict().items()}
                save_file({key: value.contiguous() for key, value in tensors.items()}, path)
                entry["weights"]["sha256"] = _sha256(path)
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            for entry in entries:
                shutil.copymode(
                    partial / MANIFEST, partial / entry["weights"]["file"]
                )  # safetensors writes for us alone

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str | None = None, trust: Iterable[str] = ()) -> Cascade:
        """Reads a cascade folder.

        Args:
            folder: local, as `save` wrote it.
            device: where the stages go, default the CPU.
            trust: packages beside this one whose classes the manifest may name.

        Raises:
            InputError: no cascade; a format version, value range or resize filter that this version does not know; a
                class of a package that is not trusted; a summary that contradicts a stage; weights that are missing,
                damaged or of another shape.
        """
        path, manifest = _read_manifest(folder)
        stages = []
        for entry in manifest["stages"]:
            what = f"stage {entry['name']!r} of {path}"
            stage = _build_stage(entry["stage"], _names(trust), what)
            for key, said, found in _contradictions(entry, _summary(stage)):
                raise InputError(
                    f"{what}: {key} is {said!r}, but the stage's own arguments give {found!r}; mend either"
                )
            _load_stage_weights(_module(stage), path.parent, entry, what)
            stages.append(stage)
        cascade = cls(_share_encoders(stages), manifest.get("metrics", []))
        return cascade if device is None else cascade.to(device)

    def set_defaults(self, settings: Sequence[StageSettings], metrics: Iterable[Mapping[str, Any]] = ()) -> None:
        """Makes an operating point the stages' default sampling, and adds the evidence for it to `metrics`.

        Args:
            settings: one a stage, as `settings` gives them.
            metrics: results with their protocols, plain data.
        """
        for stage, setting in zip(self.stages, settings, strict=True):
            stage.sampling = replace(
                stage.sampling, sampler=setting.sampler, num_steps=setting.steps, guidance=setting.guidance
            )
            if setting.aug_level is not None:
                stage.aug_level = setting.aug_level  # type: ignore[attr-defined]
        self.metrics += [dict(metric) for metric in metrics]

    def save_manifest(self, folder: str | Path) -> None:
        """Rewrites the manifest of the folder that this cascade was loaded from; the weights there stay as they are.

        Raises:
            InputError: the folder holds no cascade or one of other stages, or cannot be written.
        """
        path, manifest = _read_manifest(folder)
        if [entry["name"] for entry in manifest["stages"]] != self.names:
            raise InputError(f"{path} has stages other than {', '.join(self.names)}; give this cascade's own folder")
        for entry, stage in zip(manifest["stages"], self.stages):
            entry.update(_summary(stage))
            entry["stage"] = {"class_path": class_path(stage), "init_args": stage.hyperparameters()}
        manifest["metrics"] = self.metrics
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {_line(error)}") from error
        finally:
            partial.unlink(missing_ok=True)

    # ---- sampling

    def sample(
        self,
        captions: str | Sequence[str],
        seed: int | Sequence[int] = 0,
        guidance: float | Sequence[float | None] | None = None,
        steps: int | Sequence[int | None] | None = None,
        sampler: Sampler | str | Sequence[Sampler | str | None] | None = None,
        aug_level: float | Sequence[float | None] | None = None,
        negative: str | Sequence[str] | None = None,
        images: Tensor | Sequence[Image.Image | Tensor] | None = None,
        start_stage: int | str = 0,
        *,
        last_stage: int | str | None = None,
        batch_size: int = 32,
        first_index: int = 0,
        precision: str = "32",
        progress: Progress | None = None,
    ) -> Samples:
        """Draws one image a caption.

        Image i takes its noise in stage s from (seed, i, s) alone: the noise is the same to the bit for any batch size.
        Between stages images pass as uint8, so that a stage started from a saved PNG goes on as the chain would have.

        guidance, steps, sampler and aug_level are one value, or one for each of the cascade's stages; None is what the
        stage's `sampling` (or `aug_level`) says.

        Args:
            captions: B strings, or one.
            seed: one for all, or one an image, whose noise then depends on its own seed and not on its place.
            guidance: classifier-free guidance weight; 1 for none.
            steps: along the time, at least 1.
            sampler: an object of `imagen_lightning.samplers`, or the name of one ("ddpm", "ddim", "dpmpp").
            aug_level: in [0, 1], noise on the low-resolution image; a base stage, which takes none, leaves it aside.
            negative: one caption, or one an image, to steer away from; it stands in for the null text, so guidance must
                not be 1.
            images: what the first stage that runs takes, one a caption: (B, 3, h, w) uint8 or in [-1, 1], or PIL
                images; larger square ones are resized by the one area filter.
            start_stage: number or name of the first stage to run; after the base it needs images.
            last_stage: number or name of the last stage to run, default the cascade's last.
            batch_size: images at a time.
            first_index: i of the first image, where several calls or processes share one seed's images.
            precision: "32", or "bf16" for autocast.
            progress: called with (done, total, stage name) after each network evaluation.

        Raises:
            InputError: a value of the wrong length or range, an unknown sampler or stage, images of another size.
        """
        captions = [captions] if isinstance(captions, str) else list(captions)
        if not captions:
            raise InputError("there are no captions to sample; give at least one")
        if batch_size < 1:
            raise InputError(f"batch_size {batch_size} must be at least 1")
        if precision not in ("32", "bf16"):
            raise InputError(f"precision {precision!r} is unknown; use '32' or 'bf16'")
        start = _find(self.names, start_stage)
        stop = len(self.stages) if last_stage is None else _find(self.names, last_stage) + 1
        if stop <= start:
            raise InputError(f"last_stage {last_stage!r} lies before start_stage {start_stage!r}; swap them")
        settings = self.settings(guidance, steps, sampler, aug_level)[start:stop]
        negatives = self._negatives(negative, len(captions), settings)
        seeds = _seeds(seed, len(captions), first_index)
        low_res = self._low_res(images, start, len(captions))

        batches = [slice(first, first + batch_size) for first in range(0, len(captions), batch_size)]
        total = len(batches) * sum(setting.steps for setting in settings)
        done = 0
        outputs: list[Tensor] = []
        for number, setting in enumerate(settings, start):
            stage, parts = self.stages[number], []

            def on_step(name: str = setting.stage) -> None:
                nonlocal done
                done += 1
                if progress is not None:
                    progress(done, total, name)

            device = next(_module(stage).parameters()).device
            for rows in batches:
                given = to_float(low_res[rows]).to(device) if low_res is not None else None
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    drawn = stage.sample(
                        captions[rows],
                        [seeded_generator(own_seed, index, number) for own_seed, index in seeds[rows]],
                        guidance=setting.guidance,
                        num_steps=setting.steps,
                        sampler=setting.sampler,
                        low_res=given,
                        aug_level=setting.aug_level,
                        negative=negatives[rows] if negatives and setting.guidance != 1 else None,
                        on_step=on_step,
                    )
                parts.append(to_uint8(drawn).cpu())
            low_res = torch.cat(parts)
            outputs.append(low_res)
        return Samples(outputs[-1], outputs, settings)

    def settings(
        self, guidance: Any = None, steps: Any = None, sampler: Any = None, aug_level: Any = None
    ) -> list[StageSettings]:
        """Each stage's settings for values as `sample` takes them.

        Raises:
            InputError: a value of the wrong length or range, an unknown sampler.
        """

        def spread(name: str, value: Any) -> list[Any]:
            values = list(value) if isinstance(value, list | tuple) else [value] * len(self.stages)
            if len(values) != len(self.stages):
                raise InputError(
                    f"{name} has {len(values)} values for {len(self.stages)} stages ({', '.join(self.names)}); give "
                    f"one, or one a stage"
                )
            return values

        columns = {"guidance": guidance, "steps": steps, "sampler": sampler, "aug_level": aug_level}
        rows = zip(*(spread(name, value) for name, value in columns.items()))
        return [_settings_of(stage, *row) for stage, row in zip(self.stages, rows)]

    def _negatives(
        self, negative: str | Sequence[str] | None, count: int, settings: list[StageSettings]
    ) -> list[str] | None:
        if negative is None:
            return None
        negatives = [negative] * count if isinstance(negative, str) else list(negative)
        if len(negatives) != count:
            raise InputError(f"{len(negatives)} negative captions for {count} captions; give one, or one an image")
        if all(setting.guidance == 1 for setting in settings):
            raise InputError("negative captions act through guidance, which is 1 in every stage; set another guidance")
        return negatives

    def _low_res(self, images: Tensor | Sequence[Image.Image | Tensor] | None, start: int, count: int) -> Tensor | None:
        """(count, 3, h, w) uint8 at the size that stage `start` takes, None where it takes nothing."""
        stage = self.stages[start]
        size, name = _low_res_size(stage), _name(stage)
        if size is None:
            if images is not None:
                raise InputError(f"stage {name!r} starts from text alone; drop images, or set start_stage beyond it")
            return None
        if images is None:
            raise InputError(f"stage {name!r} starts from low-resolution images of {size} px; give images")
        if len(images) != count:
            raise InputError(f"{len(images)} images for {count} captions; give one a caption")
        return torch.stack([_fit_image(image, size, name) for image in images])


# ---- settings and inputs of sampling


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


def _settings_of(
    stage: DiffusionMixin, guidance: Any, steps: Any, sampler: Any, aug_level: float | None
) -> StageSettings:
    name, defaults = _name(stage), stage.sampling
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
    if _low_res_size(stage) is None:
        aug_level = None
    else:
        highest = stage.augmentation.max_level  # type: ignore[attr-defined]
        aug_level = stage.aug_level if aug_level is None else aug_level  # type: ignore[attr-defined]
        if not _is_number(aug_level) or not 0 <= aug_level <= highest:  # type: ignore[operator]
            raise InputError(f"aug_level {aug_level!r} of stage {name!r} must be in [0, {highest:g}], as in training")
    return StageSettings(name, sampler, steps, guidance, aug_level)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _seeds(seed: int | Sequence[int], count: int, first_index: int) -> list[tuple[int, int]]:
    """(seed, index) of each image; an image with a seed of its own has index 0."""
    if isinstance(seed, int):
        return [(seed, first_index + i) for i in range(count)]
    if len(seed) != count:
        raise InputError(f"{len(seed)} seeds for {count} captions; give one, or one a caption")
    return [(int(own), 0) for own in seed]


def _fit_image(image: Image.Image | Tensor, size: int, stage: str) -> Tensor:
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


def _find(names: Sequence[str], stage: int | str) -> int:
    """The place of a stage given by name or number (also as a string)."""
    if isinstance(stage, str) and stage in names:
        return names.index(stage)
    if (isinstance(stage, int) or stage.isdecimal()) and 0 <= int(stage) < len(names):
        return int(stage)
    known = ", ".join(f"{number} ({name})" for number, name in enumerate(names))
    raise InputError(f"stage {stage!r} is unknown; the cascade has {known}")


# ---- stages


def load_weights(stage: nn.Module, reference: str) -> None:
    """Gives a stage the weights of one in a cascade folder, and nothing else of it (`init_from`).

    Args:
        stage: of the same architecture.
        reference: "CASCADE#stage", the folder and the stage's name or number: "runs/quickstart/cascade#base".

    Raises:
        InputError: no such cascade or stage, damaged weights, or weights that do not fit.
    """
    folder, separator, name = reference.rpartition("#")
    if not separator:
        raise InputError(f"init_from {reference!r} names no stage; write CASCADE#stage, e.g. {reference}#base")
    path, manifest = _read_manifest(folder)
    entry = manifest["stages"][_find([entry["name"] for entry in manifest["stages"]], name)]
    _load_stage_weights(stage, path.parent, entry, f"stage {entry['name']!r} of {path}")


def _module(stage: DiffusionMixin) -> nn.Module:
    return cast(nn.Module, stage)


def _low_res_size(stage: DiffusionMixin) -> int | None:
    return getattr(stage, "low_res_size", None)


def _name(stage: DiffusionMixin) -> str:
    return "base" if _low_res_size(stage) is None else f"sr_{stage.image_size}"


def _num_parameters(stage: DiffusionMixin) -> int:
    return sum(parameter.numel() for parameter in _module(stage).parameters())


def _summary(stage: DiffusionMixin) -> dict[str, Any]:
    """What the manifest says of a stage for people and other programs, all of it taken from the stage."""
    encoder, sampling = stage.text.encoder, stage.sampling
    return {
        "name": _name(stage),
        "image_size": stage.image_size,
        "low_res_size": _low_res_size(stage),
        "text": None
        if encoder is None
        else {"encoder": encoder.name, "max_tokens": encoder.max_tokens, "null_text": stage.text.null_text},
        "aug_level": getattr(stage, "aug_level", None),
        "sampling": {
            "sampler": describe(sampling.sampler),
            "num_steps": sampling.num_steps,
            "guidance": sampling.guidance,
        },
    }


def _share_encoders(stages: list[DiffusionMixin]) -> list[DiffusionMixin]:
    """The stages, equal text encoders made one object: a T5 of gigabytes is held once."""
    shared: dict[str, TextEncoder] = {}
    for stage in stages:
        if stage.text.encoder is not None:
            stage.text.encoder = shared.setdefault(json.dumps(describe(stage.text.encoder)), stage.text.encoder)
    return stages


def _contradictions(said: Any, found: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, said, found) for each value of `found` that `said` has otherwise; keys that `said` lacks say nothing."""
    if isinstance(said, Mapping) and isinstance(found, Mapping):
        for name in found:
            if name in said:
                yield from _contradictions(said[name], found[name], f"{key}.{name}" if key else name)
    elif said != found:
        yield key, said, found


def _build_stage(description: Mapping[str, Any], trust: tuple[str, ...], what: str) -> DiffusionMixin:
    try:
        cls = find_class(description["class_path"], trust)
        if not issubclass(cls, DiffusionMixin):
            raise InputError(f"{class_path(cls)} is no stage")
        stage = build(description, trust).eval()
        _summary(stage)  # settings that are none show here
        return stage
    except InputError as error:
        raise InputError(f"{what}: {error}") from error
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        raise InputError(f"{what} cannot be built from its arguments: {_line(error)}") from error


def _check_tensors(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Raises InputError where the tensors are not, by name and shape, those of the module."""
    wanted = module.state_dict()
    missing, foreign = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    for problem, keys in (("lack", missing), ("have, beyond the stage's,", foreign)):
        if keys:
            others = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise InputError(f"weights of {what} {problem} {keys[0]!r}{others}: they belong to another architecture")
    for key, value in wanted.items():
        if value.shape != tensors[key].shape:
            raise InputError(
                f"weights of {what}: {key!r} has shape {tuple(tensors[key].shape)}, the stage needs "
                f"{tuple(value.shape)}; they belong to another architecture"
            )


# ---- Lightning checkpoints


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A Lightning checkpoint's plain data and tensors, the latter on the CPU and read as they are used.

    Raises:
        InputError: an address on the network; a file that is missing, empty or damaged, or holds Python objects.
    """
    _refuse_address(path, "checkpoint")
    what = f"checkpoint {str(path)!r}"
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"{what} does not exist; give a local file, e.g. RUN/checkpoints/last.ckpt")
    if file.stat().st_size == 0:
        raise InputError(f"{what} is empty; take an earlier one")
    try:
        with zipfile.ZipFile(file) as archive:
            if (bad := archive.testzip()) is not None:  # torch.load does not look at checksums
                raise zipfile.BadZipFile(f"{bad} fails its checksum")
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        # A damaged file can end its reader in any way.
        raise InputError(
            f"{what} cannot be read: it is damaged, or holds Python objects, which are never unpickled "
            f"({_line(error)}); take an earlier one"
        ) from error
    return checkpoint if isinstance(checkpoint, dict) else {}


def _stage_from_checkpoint(path: str | Path, trust: tuple[str, ...]) -> DiffusionMixin:
    _refuse_address(path, "checkpoint")
    file = _checkpoint_file(Path(path).expanduser())
    what = f"checkpoint {str(file)!r}"
    checkpoint = read_checkpoint(file)
    parts = ("hyper_parameters", "state_dict")
    if not (
        isinstance(checkpoint.get("stage_class"), str) and all(isinstance(checkpoint.get(part), dict) for part in parts)
    ):
        raise InputError(f"{what} is not one of an imagen-lightning stage; give the .ckpt of a run of this program")
    arguments = {name: value for name, value in checkpoint["hyper_parameters"].items() if name != "_instantiator"}
    stage = _build_stage({"class_path": checkpoint["stage_class"], "init_args": arguments}, trust, what)
    _check_tensors(_module(stage), checkpoint["state_dict"], what)
    _module(stage).load_state_dict(checkpoint["state_dict"])
    return stage


def _checkpoint_file(path: Path) -> Path:
    """The file itself, or a run folder's latest checkpoint."""
    if not path.is_dir():
        return path
    folder = path / "checkpoints"
    numbered = [(re.fullmatch(r"step[-=](\d+)\.ckpt", file.name), file) for file in folder.glob("*.ckpt")]
    steps = [(int(match[1]), file) for match, file in numbered if match]
    if steps:  # before last.ckpt, which a run writes when it ends and which is older where it went on and was killed
        return max(steps)[1]
    if not (folder / "last.ckpt").exists():
        raise InputError(f"run folder {str(path)!r} has no checkpoints/step-*.ckpt or checkpoints/last.ckpt")
    return folder / "last.ckpt"


# ---- cascade folders


@contextlib.contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Gives a new folder to write into, which becomes `folder` when the block ends well and vanishes when it does not.

    Raises:
        InputError: `folder` is there and not empty, or cannot be written.
    """
    _refuse_address(folder, "output folder")
    target = Path(folder).expanduser().resolve()
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InputError(f"output folder {str(folder)!r} is there already and not empty; give another")
        partial.mkdir(parents=True)
        yield partial
        partial.replace(target)
    except OSError as error:
        raise InputError(f"output folder {str(folder)!r} cannot be written: {_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_manifest(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """The manifest's path and content, its version and conventions checked."""
    _refuse_address(folder, "cascade")
    path = Path(folder).expanduser() / MANIFEST
    if not path.is_file():
        raise InputError(
            f"{str(folder)!r} is no cascade folder: it has no {MANIFEST}; `imagen-lightning cascade` makes one"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON and of UTF-8
        raise InputError(f"{path} is damaged ({_line(error)}); make the cascade anew") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not the manifest of a cascade; its format should be {FORMAT!r}")
    for key, known in (("version", VERSION), ("value_range", VALUE_RANGE), ("resize", RESIZE)):
        if manifest.get(key) != known:
            raise InputError(
                f"{path}: {key} {manifest.get(key)!r} is unknown to imagen-lightning {__version__}, which reads "
                f"{known!r}; another version may read it"
            )
    entries = manifest.get("stages")
    whole = isinstance(entries, list) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("stage"), dict)
        and isinstance(entry["stage"].get("class_path"), str)
        and isinstance(entry.get("weights"), dict)
        and isinstance(entry["weights"].get("file"), str)
        for entry in entries
    )
    if not whole or not entries:
        raise InputError(f"{path} is damaged: each of its stages needs name, stage and weights; make the cascade anew")
    metrics = manifest.get("metrics", [])
    if not isinstance(metrics, list) or not all(isinstance(metric, dict) for metric in metrics):
        raise InputError(f"{path} is damaged: its metrics are no list of objects; make that [] or mend it")
    return path, manifest


def _load_stage_weights(module: nn.Module, folder: Path, entry: Mapping[str, Any], what: str) -> None:
    name = entry["weights"]["file"]
    path = folder / name
    if Path(name).name != name or path.suffix != ".safetensors":
        raise InputError(f"weights {name!r} of stage {entry['name']!r} must be a .safetensors file in {folder}")
    if not path.is_file():
        raise InputError(f"weights {str(path)!r} of stage {entry['name']!r} are missing; copy the whole cascade folder")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"weights {str(path)!r} are damaged ({_line(error)}); copy the cascade again") from error
    _check_tensors(module, tensors, what)
    if _sha256(path) != entry["weights"].get("sha256"):
        raise InputError(f"weights {str(path)!r} are not those that {MANIFEST} was written with: their SHA-256 differs")
    module.load_state_dict(tensors)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _refuse_address(path: str | Path, what: str) -> None:
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path), re.IGNORECASE):
        raise InputError(f"{what} {str(path)!r} is an address; only local files are read: fetch it first")


def _names(trust: Iterable[str]) -> tuple[str, ...]:
    return (trust,) if isinstance(trust, str) else tuple(trust)


def _line(error: Exception) -> str:
    """The first sentence of an error, on one line."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
