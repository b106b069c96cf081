"""Conditions on samples' metadata, such as `min_side: 256, punsafe_max: 0.1`, and how many samples each removes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from imagen_lightning.data.metadata import (
    NUMBERS,
    WORDS,
    as_word,
    blank,
    column_files,
    known_fields,
    lacks,
    read_columns,
)
from imagen_lightning.data.shards import METADATA, Shards
from imagen_lightning.data.skips import Unusable
from imagen_lightning.errors import InputError, counted

_RANGES = {"similarity": (-1.0, 1.0), "punsafe": (0.0, 1.0), "pwatermark": (0.0, 1.0)}
_SIDES = {"min_side": ("width", "height"), "min_original_side": ("original_width", "original_height")}
_ASPECT = "max_aspect"

Columns = Mapping[str, np.ndarray]
"""Known field to one value a sample: float64 with NaN, or text with "", where a sample lacks it."""


@dataclass(frozen=True)
class _AtLeast:
    """The smallest of some fields is at least the limit."""

    fields: tuple[str, ...]
    limit: float

    def holds(self, columns: Columns) -> np.ndarray:
        return np.minimum.reduce([columns[name] for name in self.fields]) >= self.limit


@dataclass(frozen=True)
class _AtMost:
    fields: tuple[str, ...]
    limit: float

    def holds(self, columns: Columns) -> np.ndarray:
        return columns[self.fields[0]] <= self.limit


@dataclass(frozen=True)
class _MaxAspect:
    """The longer of two sides is at most the limit times the shorter."""

    fields: tuple[str, ...]
    limit: float

    def holds(self, columns: Columns) -> np.ndarray:
        sides = [columns[name] for name in self.fields]
        return np.maximum(*sides) <= self.limit * np.minimum(*sides)


@dataclass(frozen=True)
class _OneOf:
    fields: tuple[str, ...]
    words: tuple[str, ...]

    def holds(self, columns: Columns) -> np.ndarray:
        wanted = [word.casefold() for word in self.words]
        words, numbers = np.unique(columns[self.fields[0]], return_inverse=True)
        return np.array([str(word).casefold() in wanted for word in words], dtype=bool)[numbers]


_Condition = _AtLeast | _AtMost | _MaxAspect | _OneOf


@dataclass
class FilterCounts:
    """How many samples a filter saw and how many each of its conditions removed.

    Attributes:
        num_samples: samples seen.
        removed: samples removed, each under the first condition that did so: a condition as it was written, such as
            "punsafe_max=0.1", or "punsafe missing" where a sample lacks what the condition asks of; in their order.
    """

    num_samples: int = 0
    removed: dict[str, int] = field(default_factory=dict)

    @property
    def left(self) -> int:
        return self.num_samples - sum(self.removed.values())

    def add(self, other: FilterCounts) -> None:
        self.num_samples += other.num_samples
        for reason, count in other.removed.items():
            self.removed[reason] = self.removed.get(reason, 0) + count

    def __str__(self) -> str:
        """ "70 of 100 samples left; removed: 20 min_side=256, 10 punsafe missing"."""
        parts = ", ".join(f"{count} {reason}" for reason, count in self.removed.items() if count)
        left = f"{self.left} of {counted(self.num_samples, 'sample')} left"
        return f"{left}; removed: {parts}" if parts else left


class Filter:
    """Conditions that a sample's metadata must meet, all of them, applied in their order.

    A sample that lacks a field that a condition asks of does not meet it, and is counted apart.

    - `min_side: 256`: the shorter side of the stored image, in pixels, is at least that; `min_original_side` of the
      image before it was stored, which tells those that were enlarged.
    - `max_aspect: 2`: the longer side is at most so many times the shorter.
    - `FIELD_min` and `FIELD_max`, both inclusive, with a number's field: width, height, original_width,
      original_height (pixels), similarity (cosine, -1 to 1), punsafe, pwatermark (probabilities), aesthetic (about 1
      to 10).
    - `language: en`, `licence: [cc0, cc-by]` (or `license`) and `status`: the field is that word or one of those, in
      capitals or not.

    Args:
        conditions: name to limit, in order.

    Raises:
        InputError: an unknown name, or a limit of another type or out of range.
    """

    def __init__(self, conditions: Mapping[str, Any]) -> None:
        self.conditions: dict[str, _Condition] = {}  # by their text
        for name, value in conditions.items():
            condition = _condition(name, value)
            limit = ",".join(condition.words) if isinstance(condition, _OneOf) else f"{condition.limit:g}"
            self.conditions[f"{name}={limit}"] = condition

    @classmethod
    def parse(cls, text: str) -> Filter:
        """The filter that `min_side=256,punsafe_max=0.1,language=en,de` says: a part without "=" continues a list.

        Raises:
            InputError: as the class, or not of this form.
        """
        conditions: dict[str, Any] = {}
        name = ""
        for part in text.split(","):
            before, equals, value = (item.strip() for item in part.partition("="))
            if equals and before in conditions:
                raise InputError(f"filter {text!r} names {before!r} twice")
            if not equals and not name:
                raise InputError(f"filter {text!r}: {part.strip()!r} has no '='; write for example {_EXAMPLE}")
            name, value = (before, value) if equals else (name, before)
            conditions.setdefault(name, []).append(value)
        for name, values in conditions.items():
            if name.endswith(("_min", "_max")) or name.startswith(("min_", "max_")):
                if len(values) > 1:
                    raise InputError(f"filter {text!r}: {name} takes one number, not {','.join(values)!r}")
                try:
                    conditions[name] = float(values[0])
                except ValueError:
                    raise InputError(f"filter {text!r}: {name} takes a number, not {values[0]!r}") from None
        return cls(conditions)

    @classmethod
    def of(cls, conditions: Mapping[str, Any] | str | None) -> Filter | None:
        """The filter that a mapping or a text says; None where it sets no condition."""
        if not conditions:
            return None
        return cls.parse(conditions) if isinstance(conditions, str) else cls(conditions)

    def __str__(self) -> str:
        return ",".join(self.conditions)

    @property
    def reasons(self) -> list[str]:
        """What a sample can be removed for, in order: each condition, and before it that its fields are missing."""
        found = [reason for text, item in self.conditions.items() for reason in (_missing(item), text)]
        return list(dict.fromkeys(found))

    def select(self, columns: Columns, num_samples: int) -> tuple[np.ndarray, FilterCounts]:
        """Which samples meet every condition, (num_samples,) bool, and how many each removed.

        Args:
            columns: the known fields that there are, (num_samples,) each; a field that is not there is missing in all.
            num_samples: number of samples.
        """
        left = np.ones(num_samples, dtype=bool)
        counts = FilterCounts(num_samples, dict.fromkeys(self.reasons, 0))
        for text, condition in self.conditions.items():
            here = {name: columns.get(name, blank(name, num_samples)) for name in condition.fields}
            lacking = np.logical_or.reduce([lacks(values) for values in here.values()])
            counts.removed[_missing(condition)] += int((left & lacking).sum())
            left &= ~lacking
            holds = condition.holds(here)
            counts.removed[text] += int((left & ~holds).sum())
            left &= holds
        return left, counts

    def why_not(self, record: Mapping[str, Any]) -> str | None:
        """The first condition that a sample's metadata, under any of the usual names, does not meet.

        Returns:
            It as it was written, such as "punsafe_max=0.1", or "punsafe missing"; None where all are met.
        """
        columns = {name: np.array([value]) for name, value in known_fields(record).items()}
        _, counts = self.select(columns, 1)
        return next((reason for reason, count in counts.removed.items() if count), None)


def select_rows(
    filter_: Filter, shards: Shards, rows: Sequence[np.ndarray], cache: Path
) -> tuple[list[np.ndarray], FilterCounts]:
    """Of some rows of each shard those whose metadata meets a filter, and how many each condition removed.

    Args:
        filter_: the filter.
        shards: the shards; see `read_columns` for their metadata.
        rows: numbers of samples, one array a shard.
        cache: folder in which the metadata is kept where it cannot be beside a shard.

    Raises:
        InputError: the metadata of a shard cannot be read.
    """
    counts = FilterCounts()
    kept = []
    for shard, (path, numbers) in enumerate(zip(shards.paths_beside(), rows)):
        try:
            keys, read_json = shards.indexes[shard].keys, partial(shards.read, shard, kind=METADATA)
            columns = read_columns(path, keys, read_json, column_files(path, cache))
        except Unusable as fault:
            raise InputError(
                f"the metadata of {shards.indexes[shard].shard} cannot be read: {fault.reason.value}"
            ) from None
        mask, removed = filter_.select({name: column[numbers] for name, column in columns.items()}, len(numbers))
        counts.add(removed)
        kept.append(numbers[mask])
    return kept, counts


_EXAMPLE = "'min_side=256,punsafe_max=0.1,language=en'"


def _missing(condition: _Condition) -> str:
    return f"{' or '.join(condition.fields)} missing"


def _condition(name: str, value: Any) -> _Condition:
    field_name = "licence" if name == "license" else name
    if field_name in WORDS:
        return _OneOf((field_name,), _words(name, value))
    if name in _SIDES:
        return _AtLeast(_SIDES[name], _number(name, value, 0.0, math.inf))
    if name == _ASPECT:
        return _MaxAspect(_SIDES["min_side"], _number(name, value, 1.0, math.inf))
    field_name, _, bound = str(name).rpartition("_")
    if field_name not in NUMBERS or bound not in ("min", "max"):
        known = [*_SIDES, _ASPECT, *(f"{number}_min/_max" for number in NUMBERS), *WORDS]
        raise InputError(f"filter {name!r} is unknown; give some of {', '.join(known)}")
    limit = _number(name, value, *_RANGES.get(field_name, (-math.inf, math.inf)))
    return (_AtLeast if bound == "min" else _AtMost)((field_name,), limit)


def _number(name: str, value: Any, lowest: float, highest: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"filter {name}: {value!r} is no number")
    if not lowest <= value <= highest:
        within = f"from {lowest:g} to {highest:g}" if math.isfinite(highest) else f"of at least {lowest:g}"
        raise InputError(f"filter {name}: {value:g} is out of range; give a number {within}")
    return float(value)


def _words(name: str, value: Any) -> tuple[str, ...]:
    words: Iterable[Any] = value if isinstance(value, list | tuple) else [value]
    found = tuple(as_word(word) for word in words)
    if not found or not all(found):
        mend = "; quote the word" if value is False else ""  # YAML's `language: no`
        raise InputError(f"filter {name}: {value!r} is no word or list of words{mend}")
    return found
