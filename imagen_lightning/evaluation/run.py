"""One evaluation from its request to its folder: the matrix, or a sweep over operating points.

OUT holds `plan.json` (what was asked for), `samples/` (every image, a folder a stage and setting, and a picture of
each), `measured/` (numbers a chain) and `evaluation.json`. Run again, it goes on where it stopped. Under torchrun the
processes share the drawing and the measuring, and the first one writes.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from imagen_lightning.cascade import Cascade, StageSettings
from imagen_lightning.errors import InputError
from imagen_lightning.evaluation.data import EvaluationSet, load_evaluation_set, prompt_evaluation_set
from imagen_lightning.evaluation.drawing import Chain, Drawing, Part, chains
from imagen_lightning.evaluation.identity import drawing_sha256, settings_sha256
from imagen_lightning.evaluation.matrix import picture_of, picture_of_real, row_of, run_matrix
from imagen_lightning.evaluation.measures import Judge, Measured, Measurer
from imagen_lightning.evaluation.pictures import save_picture
from imagen_lightning.evaluation.points import Axes, best_point, points
from imagen_lightning.evaluation.processes import own_device, processes
from imagen_lightning.evaluation.prompts import read_prompts
from imagen_lightning.evaluation.schema import Evaluation, Row, save
from imagen_lightning.evaluation.words import cell, settings_of, sweep_verdict, table
from imagen_lightning.files import begun_folder, unwritable, write_text
from imagen_lightning.provenance import git_revision, versions

PLAN = "plan.json"
CAPTIONS = "captions.json"
_FREE = ("device", "batch_size", "command", "save_best", "trust", "samples")  # may differ when an evaluation goes on


@dataclass(frozen=True)
class Request:
    """What to evaluate; see `imagen-lightning evaluate --help`."""

    cascade: str
    data: str | None = None
    prompts: str | None = None
    num: int | None = 200
    axes: Mapping[str, Mapping[str, Sequence[Any]]] | None = None
    seed: int = 0
    batch_size: int = 50
    device: str | None = None
    precision: str = "32"
    caption_field: str | None = None
    inception: str | None = None
    clip: str | None = None
    lpips: str | None = None
    features: tuple[str, ...] = ()
    save_best: str | None = None
    trust: tuple[str, ...] = ()
    command: str = ""
    samples: Path | None = None  # where images are kept and found; OUT/samples where it is None


@dataclass(frozen=True)
class Outcome:
    """What `evaluate` gives the first process: evaluation.json, its table, and a line on the point that was saved."""

    result: Evaluation
    table: str
    best: str | None


def evaluate(request: Request, out: Path) -> Outcome | None:
    """Draws, measures, and writes `out`; None in every process but the first.

    Raises:
        InputError: anything in the request that cannot be used; an `out` that holds something else.
    """
    device = request.device or own_device()
    cascade = Cascade.load(request.cascade, device, trust=request.trust)
    chosen = points(cascade, Axes(request.axes or {}))
    data = _data(request, cascade)
    measurer = make_measurer(request, out / "measured", cascade.device)
    judge = None if request.save_best is None else _judge(request, measurer, data)
    try:
        return _evaluate(request, out, cascade, chosen, data, measurer, judge)
    except OSError as error:
        if (refusal := unwritable(error, out)) is not None:
            raise InputError(f"{refusal}; the same command goes on") from None
        raise


def _evaluate(
    request: Request,
    out: Path,
    cascade: Cascade,
    chosen: Sequence[tuple[StageSettings, ...]],
    data: EvaluationSet,
    measurer: Measurer,
    judge: Judge | None,
) -> Outcome | None:
    identity = drawing_sha256(request.cascade, cascade)
    whole = [Chain(0, len(point) - 1, point) for point in chosen]
    is_matrix = len(chosen) == 1 and data.images is not None
    wanted = chains(chosen[0]) if is_matrix else whole
    with ExitStack() as stack:
        part, meet = stack.enter_context(processes())
        if part.rank == 0:
            plan = _plan(request, identity, chosen, data)
            stack.enter_context(begun_folder(out, PLAN, plan, "evaluation"))
            write_text(out / "samples" / CAPTIONS, json.dumps(data.captions, indent=0) + "\n")
        meet()
        drawing = Drawing(
            cascade,
            data,
            out / "samples" if request.samples is None else request.samples,
            identity=identity,
            seed=request.seed,
            batch_size=request.batch_size,
            precision=request.precision,
            part=part,
            meet=meet,
        )
        draw_chains(drawing, wanted)
        _measure(drawing, wanted, measurer, [stage.image_size for stage in cascade.stages] if is_matrix else [])
        meet()
        if part.rank != 0:
            return None
    measured = [measurer.measure(drawing, chain) for chain in whole]
    best = None
    if is_matrix:
        matrix = run_matrix(drawing, chosen[0], measurer)
        rows, verdict = matrix.rows, matrix.verdict
    else:
        rows = [row_of(drawing, chain, item) for chain, item in zip(whole, measured)]
        verdict = sweep_verdict(rows, chosen, measured, measurer.judges(measured))
        rows += [row for row, item in zip(rows, measured) for row in _categories(data, row, item)]
    if judge is not None:
        best = _best(request, whole, [row_of(drawing, *pair) for pair in zip(whole, measured)], measured, judge)
    _pictures(drawing, wanted, out, cascade if is_matrix else None)
    evaluation = Evaluation(
        "matrix" if is_matrix else "sweep",
        request.cascade,
        datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        _environment(request, cascade),
        tuple(rows),
        verdict,
        best,
    )
    save(evaluation, out)
    if best is None:
        return Outcome(evaluation, table(evaluation), None)
    _save_best(cascade, request.cascade, chosen[best["point"]], best)
    return Outcome(evaluation, table(evaluation), f"saved to {request.cascade}: {best['words']}")


# ---- parts


def _data(request: Request, cascade: Cascade) -> EvaluationSet:
    if (request.data is None) == (request.prompts is None):
        raise InputError("give either --data or --prompts")
    if request.data is not None:
        size = cascade.stages[-1].image_size
        return load_evaluation_set(request.data, request.num or 200, size, request.seed, request.caption_field)
    if cascade.names[0] != "base":
        raise InputError(f"{request.cascade!r} begins with {cascade.names[0]!r}, which needs images; give --data")
    return prompt_evaluation_set(read_prompts(str(request.prompts)).first(request.num))


def _categories(data: EvaluationSet, row: Row, measured: Measured) -> list[Row]:
    """The row's metrics that are means over images, by category of the prompts."""
    found = []
    for category, numbers in data.categories.items():
        captions = [data.captions[number] for number in numbers]
        values = [value.to_json() for value in measured.part(numbers, captions)]
        found.append(replace(row, settings={"category": category, **row.settings}, values=tuple(values), samples=None))
    return found


def make_measurer(request: Request, folder: Path, device: torch.device) -> Measurer:
    """With all networks that the request asks for; what cannot be had is refused before anything is drawn."""
    from imagen_lightning.metrics import features
    from imagen_lightning.metrics.image_quality import LPIPS

    def path(text: str) -> Path | None:
        return None if text == "download" else Path(text)

    extractors: list[Any] = []
    if request.inception is not None:
        extractors.append(features.InceptionFeatures(path(request.inception)))
    extractors += [features.load_extractor(Path(name), request.trust) for name in request.features]
    if not extractors:
        extractors.append(features.RandomConvFeatures())
    clip = None if request.clip is None else features.ClipFeatures(request.clip)
    lpips = None if request.lpips is None else LPIPS(weights=path(request.lpips))
    for network in (*extractors, clip, lpips):
        if network is not None:
            network.sha256  # noqa: B018
    # float64, which the metrics need, is known to CPUs and NVIDIA's and AMD's GPUs.
    return Measurer(folder, extractors, clip, lpips, device=device if device.type == "cuda" else "cpu")


def _judge(request: Request, measurer: Measurer, data: EvaluationSet) -> Judge:
    """What chooses the point to save.

    Raises:
        InputError: it cannot choose here, or the cascade cannot be written.
    """
    judge = measurer.judge_of(str(request.save_best), data)
    if not os.access(Path(request.cascade).expanduser(), os.W_OK):
        raise InputError(
            f"--save-best writes into {request.cascade!r}, which cannot be written; copy the cascade, or let this user "
            "write there"
        )
    return judge


def _plan(
    request: Request, identity: str, chosen: Sequence[tuple[StageSettings, ...]], data: EvaluationSet
) -> dict[str, Any]:
    """What tells this evaluation from another."""
    plan = {key: value for key, value in asdict(request).items() if key not in _FREE}
    hashes = {"cascade": identity, "settings": settings_sha256(chosen), "data": data.sha256}
    return plan | {f"{name}_sha256": value for name, value in hashes.items()}


def draw_chains(drawing: Drawing, wanted: Sequence[Chain]) -> None:
    """Draws the chains under one progress bar."""
    total, seen = 0, set()
    for chain in wanted:
        step: Chain | None = chain
        while step is not None and drawing.name(step) not in seen:
            seen.add(drawing.name(step))
            total += drawing.evaluations(step)  # what is left of it
            step = step.before()
    with tqdm(total=total, unit=" steps", disable=total == 0 or drawing.part.rank != 0) as bar:

        def progress(done: int, what: str) -> None:
            bar.set_description(what.rsplit("-", 1)[0], refresh=False)
            bar.update(done)

        drawing.progress = progress
        for chain in wanted:
            drawing.draw(chain)


def _measure(drawing: Drawing, wanted: Sequence[Chain], measurer: Measurer, real_sizes: Sequence[int]) -> None:
    """Measures this process's share of the chains, and of the real images at some sizes."""
    jobs: list[Callable[[], Measured]] = [partial(measurer.measure, drawing, chain) for chain in wanted]
    jobs += [partial(measurer.measure_real, drawing, size) for size in real_sizes]
    part = drawing.part
    for job in tqdm(jobs[part.rank :: part.world_size], "measuring", unit=" sets", disable=part.rank != 0):
        job()


def _pictures(drawing: Drawing, wanted: Sequence[Chain], out: Path, cascade: Cascade | None) -> None:
    """A picture of each chain, and of the real images at the sizes of the cascade's stages."""
    for chain in wanted:
        drawn = drawing.draw(chain)
        save_picture(drawn.images, drawn.given, drawing.data.captions, out / picture_of(drawing, chain))
    for stage in [] if cascade is None else cascade.stages:
        images = drawing.truth(stage.image_size)
        if images is not None:
            save_picture(images, None, drawing.data.captions, out / picture_of_real(stage.image_size))


def _best(
    request: Request, whole: Sequence[Chain], rows: Sequence[Row], measured: Sequence[Measured], judge: Judge
) -> dict[str, Any]:
    """The best point by the judge, with its evidence."""
    point = best_point([judge.quality(item) for item in measured], [chain.settings for chain in whole])
    value = measured[point].value(judge.metric).to_json()
    return {
        "chosen_by": judge.metric,
        "point": point,
        "points": len(whole),
        "data": request.data or request.prompts,
        "settings": dict(rows[point].settings),
        "value": value,
        "words": f"{settings_of(rows[point])} with {judge.metric} {cell(value)}",
    }


def _save_best(cascade: Cascade, folder: str, settings: Sequence[StageSettings], best: Mapping[str, Any]) -> None:
    """Makes the best point the cascade's own, its evidence beside it; once, however often the evaluation is run."""
    evidence = {key: value for key, value in best.items() if key not in ("point", "words")}
    cascade.set_defaults(settings, [] if evidence in cascade.metrics else [evidence])
    cascade.save_manifest(folder)


def _environment(request: Request, cascade: Cascade) -> dict[str, Any]:
    device = cascade.device
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "processes": Part.of_environment().world_size,
        "git": git_revision(),
        "command": request.command,
    }
