"""What a fine-tuning changed: both cascades draw the same captions from the same noise, and are measured alike.

OUT holds `plan.json` (what was asked for), `samples/` (every image, as an evaluation keeps them), `measured/` (numbers
a chain), `shown/` and `neighbours/` (the page's pictures). Run again, it goes on where it stopped. Under torchrun the
processes share the drawing, and the first one measures.
"""

from __future__ import annotations

import datetime
import platform
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from imagen_lightning.cascade import Cascade
from imagen_lightning.errors import InputError
from imagen_lightning.evaluation.data import EvaluationSet
from imagen_lightning.evaluation.identity import drawing_sha256, images_sha256
from imagen_lightning.evaluation.measures import Measurer
from imagen_lightning.evaluation.processes import own_device, processes
from imagen_lightning.evaluation.run import PLAN, make_measurer
from imagen_lightning.evaluation.run import Request as EvaluationRequest
from imagen_lightning.files import begun_folder, unwritable
from imagen_lightning.finetuning.evidence_copies import Group, find_copies
from imagen_lightning.finetuning.evidence_data import NEW, OLD, OWN, TRAINED, EvidenceRequest, Sets, load_sets
from imagen_lightning.finetuning.evidence_differences import differences
from imagen_lightning.finetuning.evidence_pair import changes, is_trained, match
from imagen_lightning.finetuning.evidence_schema import Evidence, Part
from imagen_lightning.finetuning.evidence_sides import DrawingOptions, Side, draw_side, features_of
from imagen_lightning.finetuning.evidence_words import copying_verdict, part_sentence, verdict
from imagen_lightning.images import save_png, to_pil
from imagen_lightning.provenance import git_revision, versions

NUM_SHOWN = 12  # captions of a grid
_FREE = ("device", "batch_size", "command", "trust", "samples")  # may differ when it goes on


def gather(request: EvidenceRequest, out: Path) -> Evidence | None:
    """Draws, measures, and writes into `out`; None in every process but the first.

    Raises:
        InputError: anything in the request that cannot be used; cascades of other stages or sizes; an `out` that holds
            something else.
    """
    pairs = match(request.before, request.after)
    _check_settings(request, len(pairs))
    device = request.device or own_device()
    sets = load_sets(request, [new for _, new in pairs])
    measurers = _measurers(request, out, device, sets)
    try:
        with processes() as (share, meet), ExitStack() as stack:
            if share.rank == 0:
                stack.enter_context(begun_folder(out, PLAN, _plan(request, sets), "comparison"))
            meet()
            options = DrawingOptions(
                request.samples or out / "samples", request.guidance, request.steps, request.seed, request.batch_size,
                request.precision, share, meet,
            )  # fmt: skip
            sides = [
                _side(folder, device, request, sets.drawn(is_after), options, measurers)
                for folder, is_after in ((request.before, False), (request.after, True))
            ]
            return None if share.rank else _evidence(request, out, device, sets, sides, measurers)
    except OSError as error:
        if (refusal := unwritable(error, out)) is not None:
            raise InputError(f"{refusal}; the same command goes on") from None
        raise


def _side(
    folder: str,
    device: str,
    request: EvidenceRequest,
    sets: Mapping[str, EvaluationSet],
    options: DrawingOptions,
    measurers: Mapping[str, Measurer],
) -> Side:
    """What one cascade draws; it is loaded here and let go: two large ones may not fit."""
    cascade = Cascade.load(folder, device, trust=request.trust)
    return draw_side(cascade, drawing_sha256(folder, cascade), sets, options, measurers)


def _evidence(
    request: EvidenceRequest,
    out: Path,
    device: str,
    sets: Sets,
    sides: list[Side],
    measurers: Mapping[str, Measurer],
) -> Evidence:
    parts = {name: _part(name, data, sides, measurers[name]) for name, data in sets.measured().items()}
    stages = changes(request.before, request.after)
    copying = _copying(sets, sides[1], measurers[NEW], out)
    old = parts.get(OLD)
    return Evidence(
        before=request.before,
        after=request.after,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        environment=_environment(request, device),
        verdict=verdict(
            parts[NEW].judging,
            None if old is None else old.judging,
            None if copying is None else copying_verdict(copying["rows"]),
            is_trained(stages),
            old is not None,
        ),
        new=parts[NEW],
        old=old,
        copying=copying,
        grids=tuple(_grids(sets, sides, out)),
        stages=tuple(stages),
    )


# ---- parts


def _check_settings(request: EvidenceRequest, count: int) -> None:
    """Raises InputError where settings are given for another number of stages."""
    for name in ("guidance", "steps"):
        value = getattr(request, name)
        if isinstance(value, list) and len(value) != count:
            raise InputError(f"--{name} has {len(value)} values for {count} stages; give one, or one a stage")


def _measurers(request: EvidenceRequest, out: Path, device: str, sets: Sets) -> dict[str, Measurer]:
    """One a measured set, since each knows the real images of one; they share their networks."""
    wanted = EvaluationRequest(
        request.before, inception=request.inception, clip=request.clip, features=request.features, trust=request.trust
    )
    first = make_measurer(wanted, out / "measured" / NEW, torch.device(device))
    own = [extractor for extractor in first.extractors if extractor is not first.clip]
    found = {NEW: first}
    if sets.old is not None:
        found[OLD] = Measurer(out / "measured" / OLD, own, first.clip, device=first.device)
    return found


def _plan(request: EvidenceRequest, sets: Sets) -> dict[str, Any]:
    """What tells this comparison from another."""
    plan: dict[str, Any] = {key: value for key, value in asdict(request).items() if key not in _FREE}
    for side in ("before", "after"):
        plan[f"{side}_sha256"] = images_sha256(getattr(request, side), request.trust, request.guidance, request.steps)
    plan |= {f"{name}_sha256": data.sha256 for name, data in sets.drawn(True).items()}
    if sets.training is not None:
        plan["training_sha256"] = sets.training.sha256
    return plan


def _part(name: str, data: EvaluationSet, sides: list[Side], measurer: Measurer) -> Part:
    before, after = (side.measured[name] for side in sides)
    judges = measurer.judges([before, after])
    features = {}
    if data.images is not None:
        for extractor in measurer.extractors:
            images = [sides[0].images[name], sides[1].images[name], data.images]
            first, second, real = (features_of(extractor, item, measurer.device) for item in images)
            features[extractor.distance_name] = (first, second, real)
    found = [item.to_json() for item in differences(before, after, features)]
    judge = judges[0].metric if judges else None
    return Part(
        name=data.name,
        num=len(data),
        before=tuple(sides[0].rows[name]),
        after=tuple(sides[1].rows[name]),
        real=tuple(sides[1].real[name]),
        differences=tuple(found),
        judge=judge,
        sentence=part_sentence(found, judge),
    )


def _copying(sets: Sets, after: Side, measurer: Measurer, out: Path) -> dict[str, Any] | None:
    if sets.training is None or sets.new.images is None:
        return None
    groups = [Group("held-out captions", after.images[NEW], sets.new.captions, after.protocol(NEW))]
    if sets.trained is not None:
        groups.append(
            Group("captions trained on", after.images[TRAINED], sets.trained.captions, after.protocol(TRAINED))
        )
    return find_copies(groups, sets.new.images, sets.training, measurer.extractors[0], measurer.device, out)


def _grids(sets: Sets, sides: list[Side], out: Path) -> Iterator[dict[str, Any]]:
    """The same captions and noise by both cascades, as pictures of their own in OUT/shown."""
    titles = {OWN: "Pictures of own captions", NEW: "Pictures of the new domain", OLD: "Pictures from before"}
    for name, title in titles.items():
        data = sets.drawn(False).get(name)
        if data is None:
            continue
        shown = list(range(len(data))) if name == OWN else _first_of_captions(data.captions)
        cells = []
        for number in shown:
            cell: dict[str, Any] = {"caption": data.captions[number], "real": None}
            images = {"before": sides[0].images[name], "after": sides[1].images[name], "real": data.images}
            for side, found in images.items():
                if found is not None:
                    cell[side] = f"shown/{name}-{side}-{number:05d}.png"
                    save_png(to_pil(found[number : number + 1][0]), out / cell[side])
            cells.append(cell)
        yield {"title": title, "cells": cells}


def _first_of_captions(captions: list[str]) -> list[int]:
    """The first image of distinct captions, evenly spaced; where there are few captions, further images of them."""
    seen: dict[str, list[int]] = {}
    for number, caption in enumerate(captions):
        seen.setdefault(caption, []).append(number)
    groups = list(seen.values())
    if len(groups) >= NUM_SHOWN:
        return [groups[k * len(groups) // NUM_SHOWN][0] for k in range(NUM_SHOWN)]
    rounds = [group[k] for k in range(max(map(len, groups))) for group in groups if k < len(group)]
    return sorted(rounds[:NUM_SHOWN], key=lambda number: (captions[number], number))


def _environment(request: EvidenceRequest, device: str) -> dict[str, Any]:
    is_gpu = device.startswith("cuda")
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if is_gpu else device,
        "threads": torch.get_num_threads(),
        "git": git_revision(),
        "seed": request.seed,
        "precision": request.precision,
        "command": request.command,
    }


def with_runs(evidence: Evidence, runs: list[dict[str, Any]]) -> Evidence:
    """The evidence with what the training took."""
    return replace(evidence, runs=tuple(runs))
