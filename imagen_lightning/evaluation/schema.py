"""EVAL/evaluation.json: what an evaluation found, as the report reads it; imports no torch.

{"format": 1, "kind": "matrix" | "sweep", "cascade": PATH, "created": ISO 8601, "environment": {…},
 "rows": [{"stage": "base", "input": "real" | "generated" | "chain" | null,
           "settings": {"guidance": 2.0, "steps": 25, "sampler": …, "aug_level": …, "seed": 0},
           "values": [a metric's value with its protocol, …],
           "seconds_per_image": 0.02, "peak_memory_bytes": 812345678, "samples": "samples/base.png"}],
 "verdict": "which stage costs most and by how much" | null, "best": {…} | null}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from imagen_lightning.errors import InputError
from imagen_lightning.files import plain, write_json

EVALUATION = "evaluation.json"
FORMAT = 1
KINDS = ("matrix", "sweep")
INPUTS = ("real", "generated", "chain", None)


@dataclass(frozen=True)
class Row:
    """One operating point of one stage.

    Attributes:
        stage: its name in the cascade.
        input: the low-resolution image that a super-resolution stage was given: "real", "generated" by the stages
            before it, or "chain" where the row is the whole cascade's; None for a base stage.
        settings: guidance, steps, sampler, aug_level, seed, weights and what else was set, as plain data; the groups of
            a protocol one by one, "sampling.spacing".
        values: the metrics, each the JSON of a `imagen_lightning.metrics.protocol.Value`.
        seconds_per_image: of sampling, or None where it was not measured.
        peak_memory_bytes: of sampling, or None where it was not measured.
        samples: a PNG of the row's images, relative to the evaluation's folder, or None.

    Raises:
        InputError: an unknown input; samples outside of the folder.
    """

    stage: str
    input: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    values: tuple[Mapping[str, Any], ...] = ()
    seconds_per_image: float | None = None
    peak_memory_bytes: int | None = None
    samples: str | None = None

    def __post_init__(self) -> None:
        if self.input not in INPUTS:
            raise InputError(f"input {self.input!r} of {self.stage!r} is unknown; use one of {_listed(INPUTS)}")
        place = PurePosixPath(self.samples or "")
        if place.is_absolute() or ".." in place.parts:
            raise InputError(f"samples {self.samples!r} of {self.stage!r} lie outside of the evaluation's folder")


@dataclass(frozen=True)
class Evaluation:
    """A matrix (each stage at its own place) or a sweep (one stage at many settings).

    Attributes:
        kind: "matrix" or "sweep".
        cascade: the cascade's folder.
        created: ISO 8601, UTC.
        environment: versions, git revision, device, command: plain data.
        rows: in the order in which they are to be read.
        verdict: one line, or None where there is none (yet).
        best: the operating point that was chosen, with its evidence, or None.

    Raises:
        InputError: an unknown kind.
    """

    kind: str
    cascade: str
    created: str
    environment: Mapping[str, Any]
    rows: tuple[Row, ...]
    verdict: str | None = None
    best: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"kind {self.kind!r} of an evaluation is unknown; use one of {_listed(KINDS)}")

    def to_json(self) -> dict[str, Any]:
        """Plain data, as in the file; numbers that JSON lacks become "nan", "inf" and "-inf"."""
        return {"format": FORMAT, **plain(asdict(self))}

    @classmethod
    def from_json(cls, content: Any) -> Evaluation:
        """The evaluation that `to_json` gave; entries that it does not know are left out.

        Raises:
            InputError: the content is of another format, or something is missing or of the wrong type.
        """
        found = content.get("format") if isinstance(content, Mapping) else None
        if found != FORMAT:
            raise InputError(f"format {found!r} is unknown; this version reads format {FORMAT}")
        rows = tuple(_row(item, f"rows[{i}]") for i, item in enumerate(_take(content, "rows", list)))
        return cls(
            kind=_take(content, "kind", str),
            cascade=_take(content, "cascade", str),
            created=_take(content, "created", str),
            environment=_take(content, "environment", dict),
            rows=rows,
            verdict=_take(content, "verdict", str, None),
            best=_take(content, "best", dict, None),
        )


def save(evaluation: Evaluation, folder: str | Path) -> None:
    """Writes FOLDER/evaluation.json whole or not at all, in the place of an earlier one."""
    write_json(Path(folder) / EVALUATION, evaluation.to_json())


def load(folder: str | Path) -> Evaluation:
    """Reads FOLDER/evaluation.json.

    Raises:
        InputError: there is none, or it is not whole.
    """
    path = Path(folder) / EVALUATION
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; give the folder of an evaluation") from None
    except ValueError:  # JSON's and UTF-8's
        raise InputError(f"{path} is no whole JSON; run the evaluation again") from None
    try:
        return Evaluation.from_json(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _row(content: Any, place: str) -> Row:
    if not isinstance(content, Mapping):
        raise InputError(f"{place} is no object")
    values = _take(content, "values", list, [], place)
    if not all(isinstance(value, Mapping) for value in values):
        raise InputError(f"{place}.values are not all objects")
    seconds = _take(content, "seconds_per_image", (int, float), None, place)
    return Row(
        stage=_take(content, "stage", str, place=place),
        input=_take(content, "input", str, None, place),
        settings=_take(content, "settings", dict, {}, place),
        values=tuple(values),
        seconds_per_image=None if seconds is None else float(seconds),
        peak_memory_bytes=_take(content, "peak_memory_bytes", int, None, place),
        samples=_take(content, "samples", str, None, place),
    )


_REQUIRED = object()


def _take(
    content: Mapping[str, Any], key: str, kind: type | tuple[type, ...], default: Any = _REQUIRED, place: str = ""
) -> Any:
    """An entry of the given type; its default where it is missing or null."""
    value = content.get(key)
    if value is None and default is not _REQUIRED:
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        where = f"{place}.{key}" if place else key
        raise InputError(f"{where} is {'missing' if value is None else f'{value!r}, of the wrong type'}")
    return value


def _listed(words: tuple[str | None, ...]) -> str:
    return ", ".join("null" if word is None else word for word in words)
