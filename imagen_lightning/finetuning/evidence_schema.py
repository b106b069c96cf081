"""PAGE.json: what a fine-tuning changed, as the page reads it; imports no torch.

{"format": 1, "before": PATH, "after": PATH, "created": ISO 8601, "environment": {…}, "verdict": "…",
 "new": part, "old": part | null, "copying": {…} | null, "grids": [grid, …], "stages": [{…}, …], "runs": [{…}, …]}

A part is what both cascades draw of one set of captions: {"name", "num", "before": [row, …], "after": [row, …],
"real": [row, …], "differences": [{"metric", "before", "after", "value", "low", "high", "confidence", "verdict"}, …],
"judge", "sentence"}, its rows those of evaluation.json. A grid is {"title", "cells": [{"caption", "before", "after",
"real"}, …]}.
Pictures are named relative to the folder beside the page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from imagen_lightning.errors import InputError
from imagen_lightning.evaluation.schema import Row
from imagen_lightning.files import plain, write_json

FORMAT = 1


@dataclass(frozen=True)
class Part:
    """Both cascades on one set of captions.

    Attributes:
        name: of the data or prompts.
        num: captions.
        before, after: rows by stage, the whole cascade's last.
        real: of the real images, where there are any.
        differences: of the whole cascade's metrics, each the JSON of a `Difference`.
        judge: the metric by which they are judged, or None where nothing was measured.
        sentence: what they say, by the first metric that can judge.
    """

    name: str
    num: int
    before: tuple[Row, ...]
    after: tuple[Row, ...]
    real: tuple[Row, ...]
    differences: tuple[Mapping[str, Any], ...]
    judge: str | None
    sentence: str

    @property
    def judging(self) -> Mapping[str, Any] | None:
        """The judge's difference."""
        return next((item for item in self.differences if item["metric"] == self.judge), None)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Part:
        before, after, real = (tuple(_row(row) for row in content[side]) for side in ("before", "after", "real"))
        return cls(
            name=content["name"],
            num=content["num"],
            before=before,
            after=after,
            real=real,
            differences=tuple(content["differences"]),
            judge=content["judge"],
            sentence=content["sentence"],
        )


@dataclass(frozen=True)
class Evidence:
    """All that the page shows.

    Attributes:
        before, after: the cascades' folders.
        created: ISO 8601, UTC.
        environment: versions, device, command, options: plain data.
        verdict: in plain words.
        new: on the new domain.
        old: on what the cascade could do before; None where nobody asked.
        copying: nearness to the training images, see `evidence_copying`; None where nobody asked.
        grids: both cascades' pictures of the same captions and noise.
        stages: what became of each stage: parameters, how many changed, origins.
        runs: what the training took, as far as its run folders tell.
    """

    before: str
    after: str
    created: str
    environment: Mapping[str, Any]
    verdict: str
    new: Part
    old: Part | None = None
    copying: Mapping[str, Any] | None = None
    grids: tuple[Mapping[str, Any], ...] = ()
    stages: tuple[Mapping[str, Any], ...] = ()
    runs: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **plain(asdict(self))}

    @classmethod
    def from_json(cls, content: Any) -> Evidence:
        """The evidence that `to_json` gave.

        Raises:
            InputError: the content is of another format, lacks something, or names pictures outside of its folder.
        """
        found = content.get("format") if isinstance(content, Mapping) else None
        if found != FORMAT:
            raise InputError(f"format {found!r} is unknown; this version reads format {FORMAT}")
        try:
            made = cls(
                before=content["before"],
                after=content["after"],
                created=content["created"],
                environment=content["environment"],
                verdict=content["verdict"],
                new=Part.from_json(content["new"]),
                old=None if content["old"] is None else Part.from_json(content["old"]),
                copying=content["copying"],
                grids=tuple(content["grids"]),
                stages=tuple(content["stages"]),
                runs=tuple(content["runs"]),
            )
            pictures = made.pictures()
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"this is no evidence of a fine-tuning ({error}); make it anew") from None
        for name in pictures:
            place = PurePosixPath(name)
            if place.is_absolute() or ".." in place.parts:
                raise InputError(f"picture {name!r} lies outside of the folder beside the page")
        return made

    def pictures(self) -> list[str]:
        """The names of all pictures."""
        shown = [
            cell.get(side) for grid in self.grids for cell in grid["cells"] for side in ("before", "after", "real")
        ]
        for item in (self.copying or {}).get("shown", []):
            shown += [item["sample"], *(near["image"] for near in item["nearest"].values())]
        return [name for name in shown if name is not None]


def save(evidence: Evidence, path: Path) -> None:
    """Writes the JSON whole or not at all, in the place of an earlier one."""
    write_json(path, evidence.to_json())


def load(path: Path) -> Evidence:
    """Reads it.

    Raises:
        InputError: there is none, or it is not whole.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:  # JSON's and UTF-8's
        raise InputError(f"{path} is no whole JSON; make it anew") from None
    try:
        return Evidence.from_json(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _row(content: Mapping[str, Any]) -> Row:
    return Row(**{**content, "values": tuple(content["values"])})
