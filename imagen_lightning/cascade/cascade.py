"""Trained stages in a row: sampled, saved to a folder, and loaded from one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from imagen_lightning.cascade.description import (
    as_module,
    low_res_size,
    num_parameters,
    package_names,
    share_encoders,
    stage_name,
    stage_summary,
)
from imagen_lightning.cascade.folder import read_folder, rewrite_manifest, write_folder
from imagen_lightning.cascade.local import first_line
from imagen_lightning.cascade.origin import licences
from imagen_lightning.cascade.sampling import (
    Samples,
    StageSettings,
    check_words,
    find_stage,
    image_seeds,
    low_res_images,
    negatives_of,
    settings_of,
)
from imagen_lightning.cascade.sources import stages_of
from imagen_lightning.cascade.weights import MAX_SHARD_SIZE, find_dtype
from imagen_lightning.diffusion.random import seeded_generator
from imagen_lightning.images import to_float, to_uint8
from imagen_lightning.stages import DiffusionMixin
from imagen_lightning.types import InputError, Sampler

Progress = Callable[[int, int, str], None]


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
            taken, name = low_res_size(stage), stage_name(stage)
            if taken is None:
                raise InputError(
                    f"stage {name!r} of {stage.image_size} px takes no low-resolution image but follows stage "
                    f"{stage_name(before)!r} of {before.image_size} px; put it first"
                )
            if taken != before.image_size:
                raise InputError(
                    f"stage {name!r} takes images of {taken} px but stage {stage_name(before)!r} before it makes "
                    f"{before.image_size} px; order the stages by size and let each take what the last one makes"
                )

    @property
    def names(self) -> list[str]:
        """The stages' names: "base", and "sr_256" for super-resolution to 256 px."""
        return [stage_name(stage) for stage in self.stages]

    @property
    def device(self) -> torch.device:
        return next(as_module(self.stages[-1]).parameters()).device

    def to(self, device: torch.device | str) -> Cascade:
        """Moves every stage and returns the cascade.

        Raises:
            InputError: no such device on this machine.
        """
        check_device(device)
        for stage in self.stages:
            as_module(stage).to(device)
        return self

    def describe(self) -> str:
        """One line a stage for people: size, parameters, text, default sampling, licences of imported weights."""
        lines = []
        for stage in self.stages:
            summary = stage_summary(stage)
            low, text, sampling = summary["low_res_size"], summary["text"], summary["sampling"]
            lines.append(
                f"{summary['name']}: {f'{low} -> ' if low else ''}{stage.image_size} px, "
                f"{num_parameters(stage) / 1e6:.1f}M parameters, "
                + (f"text {text['encoder']} ({text['max_tokens']} tokens)" if text else "no text")
                + f", {type(stage.sampling.sampler).__name__} {sampling['num_steps']} steps, "
                f"guidance {sampling['guidance']:g}"
                + (f", aug level {summary['aug_level']:g}" if low else "")
                + "".join(f", licence {licence}" for licence in licences(stage.origin))
            )
        return "\n".join(lines)

    # ---- making, saving, loading

    @classmethod
    def from_checkpoints(cls, paths: Sequence[str | Path], trust: Iterable[str] = ()) -> Cascade:
        """Joins trained stages, on the CPU, in the cascade's order.

        A checkpoint's weights are those in its state_dict: averaged where the run averaged them. The adapter of a stage
        that was trained with one is merged into its weights. Evaluations of other cascades are left behind.

        Args:
            paths: each a Lightning checkpoint (a local file), a run folder, whose checkpoint of the latest step (else
                last.ckpt) is taken, a stage of another cascade ("CASCADE#stage", name or number) or a whole cascade
                folder, all of whose stages are taken.
            trust: packages beside this one whose classes the files may name.

        Raises:
            InputError: an address on the network; a file that is missing, empty, damaged, or no stage's checkpoint;
                a class of a package that is not trusted; weights that do not fit; sizes that do not chain.
        """
        trusted = package_names(trust)
        return cls(share_encoders([stage for path in paths for stage in stages_of(path, trusted)]))

    def save(self, folder: str | Path, max_shard_size: int = MAX_SHARD_SIZE) -> None:
        """Writes the manifest and the weights to a new or empty folder, whole or not at all.

        Args:
            folder: to make.
            max_shard_size: bytes of weights a file; a larger stage has several.

        Raises:
            InputError: the folder holds something or cannot be written, or a stage cannot be described as plain data.
        """
        write_folder(folder, self.stages, self.metrics, max_shard_size)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: torch.device | str | None = None,
        trust: Iterable[str] = (),
        dtype: str | None = None,
    ) -> Cascade:
        """Reads a cascade folder in the memory of its stages and once more that of the largest tensor.

        Args:
            folder: local, as `save` wrote it.
            device: where the stages go, default the CPU.
            trust: packages beside this one whose classes the manifest may name.
            dtype: of the weights, "float32", "bfloat16" or "float16"; None keeps the files' own.

        Raises:
            InputError: no cascade; a format version, value range or resize filter that this version does not know; a
                class of a package that is not trusted; a summary that contradicts a stage; weights that are missing,
                damaged or of another shape; an unknown dtype or device.
        """
        find_dtype(dtype)
        check_device(device or "cpu")
        cascade = cls(*read_folder(folder, package_names(trust), dtype, device or "cpu"))
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
        rewrite_manifest(folder, self.stages, self.metrics)

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
            seed: in [0, 2^63), one for all, or one an image, whose noise then depends on its own seed and not on its
                place.
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
        start = find_stage(self.names, start_stage)
        stop = len(self.stages) if last_stage is None else find_stage(self.names, last_stage) + 1
        if stop <= start:
            raise InputError(f"last_stage {last_stage!r} lies before start_stage {start_stage!r}; swap them")
        settings = self.settings(guidance, steps, sampler, aug_level)[start:stop]
        negatives = negatives_of(negative, len(captions), settings)
        check_words(self.stages, self.stages[start:stop], [*captions, *(negatives or ())])
        seeds = image_seeds(seed, len(captions), first_index)
        low_res = low_res_images(self.stages[start], images, len(captions))

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

            device = next(as_module(stage).parameters()).device
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
        return [settings_of(stage, *row) for stage, row in zip(self.stages, rows)]


def check_device(device: torch.device | str) -> None:
    """Raises InputError where this machine has no such device."""
    try:
        torch.empty(1, device=device).cpu()  # "meta" holds nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {str(device)!r} cannot be used here ({first_line(error)}); try cpu") from error
