"""Operating points of a cascade: the settings that a sweep tries, and the best of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from imagen_lightning.cascade import Cascade, StageSettings
from imagen_lightning.errors import InputError

NAMES = ("guidance", "steps", "sampler", "aug_level")


@dataclass(frozen=True)
class Axes:
    """What a sweep varies: values by (setting, stage), as `--guidance base=1,2 --aug-level 0,0.1` gives them.

    Attributes:
        values: "guidance", "steps", "sampler" or "aug_level" to stage name to values; the stage "" stands for all
            stages together (for aug_level: all super-resolution stages), which then share each value.
    """

    values: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)

    @property
    def num_points(self) -> int:
        count = 1
        for by_stage in self.values.values():
            for values in by_stage.values():
                count *= len(values)
        return count


def points(cascade: Cascade, axes: Axes) -> list[tuple[StageSettings, ...]]:
    """Every combination of the axes' values, the other settings being the cascade's own; the last axis varies fastest.

    The axes of earlier stages vary slowest, so that their images are drawn once for all that follows.

    Raises:
        InputError: an unknown setting or stage, a setting given for all stages and for one too, an aug_level for a
            stage that takes none, or values that the cascade refuses.
    """
    flat: list[tuple[int, str, str, Sequence[Any]]] = []
    for name, by_stage in axes.values.items():
        if name not in NAMES:
            raise InputError(f"{name!r} is no setting of sampling; use {', '.join(NAMES)}")
        for stage, values in by_stage.items():
            if stage and stage not in cascade.names:
                raise InputError(f"{name}: stage {stage!r} is unknown; the cascade has {', '.join(cascade.names)}")
            if "" in by_stage and len(by_stage) > 1:
                raise InputError(f"{name} is given for all stages and for {stage or 'one'!r} too; name each stage")
            if name == "aug_level" and not _takes_aug_level(cascade, stage):
                raise InputError(f"aug_level: stage {stage!r} takes no low-resolution image; give it for another")
            flat.append((_first(cascade, name, stage), name, stage, values))
    flat.sort(key=lambda item: item[0])
    return [_point(cascade, flat, chosen) for chosen in product(*(values for *_, values in flat))]


def _first(cascade: Cascade, name: str, stage: str) -> int:
    """The number of the first stage that the axis acts on."""
    if stage:
        return cascade.names.index(stage)
    takes = [name != "aug_level" or hasattr(item, "low_res_size") for item in cascade.stages]
    return takes.index(True)


def _takes_aug_level(cascade: Cascade, stage: str) -> bool:
    chosen = cascade.stages if not stage else [cascade.stages[cascade.names.index(stage)]]
    return any(hasattr(item, "low_res_size") for item in chosen)


def _point(
    cascade: Cascade, flat: Sequence[tuple[int, str, str, Sequence[Any]]], chosen: Sequence[Any]
) -> tuple[StageSettings, ...]:
    settings: dict[str, list[Any]] = {name: [None] * len(cascade.stages) for name in NAMES}
    for (_, name, stage, _), value in zip(flat, chosen):
        for number, own in enumerate(cascade.names):
            if stage in ("", own):
                settings[name][number] = value
    return tuple(cascade.settings(**settings))


def best_point(quality: Sequence[float], settings: Sequence[Sequence[StageSettings]]) -> int:
    """The point of the highest quality; among equals the one of the fewest network evaluations, then the first."""
    return max(range(len(quality)), key=lambda place: (quality[place], -num_evaluations(settings[place]), -place))


def num_evaluations(settings: Sequence[StageSettings]) -> int:
    """Of the networks for one image; guidance other than 1 takes two a step."""
    return sum(setting.steps * (1 if setting.guidance == 1 else 2) for setting in settings)


def pareto(quality: Sequence[float], cost: Sequence[float]) -> list[int]:
    """The points that no other beats: none has at least the quality at no more cost, and one of the two better."""
    kept = []
    for i, (own_quality, own_cost) in enumerate(zip(quality, cost)):
        beaten = any(
            q >= own_quality and c <= own_cost and (q > own_quality or c < own_cost) for q, c in zip(quality, cost)
        )
        if not beaten:
            kept.append(i)
    return kept
