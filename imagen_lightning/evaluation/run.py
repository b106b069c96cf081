"""One evaluation from its request to its folder: the matrix, or a sweep over operating points.

OUT holds `plan.json` (what was asked for), `samples/` (every image, a folder a stage and setting, and a picture of
each), `measured/` (numbers a chain) and `evaluation.json`. Run again, it goes on where it stopped. Under torchrun the
processes share the drawing, and the first one measures.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from imagen_lightning.cascade import MANIFEST, Cascade, StageSettings
from imagen_lightning.errors import InputError, counted
from imagen_lightning.evaluation.data import EvaluationSet, load_evaluation_set, prompt_evaluation_set
from imagen_lightning.evaluation.drawing import Chain, Drawing, Part, chains
from imagen_lightning.evaluation.matrix import row_of, run_matrix
from imagen_lightning.evaluation.measures import Judge, Measured, Measurer
from imagen_lightning.evaluation.pictures import save_picture
from imagen_lightning.evaluation.points import Axes, pareto, points
from imagen_lightning.evaluation.prompts import read_prompts
from imagen_lightning.evaluation.schema import Evaluation, Row, save
from imagen_lightning.files import write_json
from imagen_lightning.provenance import git_revision, versions

PLAN = "plan.json"
_FREE = (
    "device",
    "batch_size",
    "command",
    "save_best",
    "trust",
    "samples",
)  # what may differ when an evaluation goes on


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
    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cascade = Cascade.load(request.cascade, device, trust=request.trust)
    identity = _identity(Path(request.cascade).expanduser())
    chosen = points(cascade, Axes(request.axes or {}))
    data = _data(request, cascade)
    extractors, clip = _extractors(request)
    measurer = Measurer(out / "measured", extractors, clip)
    if request.save_best is not None:
        measurer.judge_of(request.save_best)
    with _processes() as (part, meet):
        if part.rank == 0:
            _begin(out, request, identity, data.sha256)
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
        whole = [Chain(0, len(point) - 1, point) for point in chosen]
        is_matrix = len(chosen) == 1 and data.images is not None
        _draw(drawing, chains(chosen[0]) if is_matrix else whole)
        if part.rank != 0:
            return None
    if is_matrix:
        matrix = run_matrix(drawing, chosen[0], measurer)
        rows, verdict, measured = matrix.rows, matrix.verdict, [measurer.measure(drawing, whole[0])]
        for chain in chains(chosen[0]):
            _picture(drawing, chain, out)
    else:
        measured = [measurer.measure(drawing, chain) for chain in whole]
        rows = [row_of(drawing, chain, item) for chain, item in zip(whole, measured)]
        verdict = _sweep_verdict(rows, measured, measurer)
        rows += [row for row, item in zip(rows, measured) for row in _categories(data, row, item)]
        for chain in whole:
            _picture(drawing, chain, out)
    best = None
    if request.save_best is not None:
        best = _save_best(cascade, request, chosen, rows, measured, measurer)
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
    line = None if best is None else f"saved to {request.cascade}: {best['words']}"
    return Outcome(evaluation, table(evaluation), line)


def table(evaluation: Evaluation) -> str:
    """The rows for a terminal: metrics that stand in most rows, with their intervals."""
    metrics = [value["metric"] for row in evaluation.rows for value in row.values if "," not in value["metric"]]
    names = list(dict.fromkeys(metrics))
    head = ["stage", "input", *_setting_names(evaluation), *names, "s/image"]
    lines = [head]
    for row in evaluation.rows:
        found = {value["metric"]: value for value in row.values}
        lines.append(
            [
                row.stage,
                row.input or "-",
                *(_short(row.settings.get(name)) for name in _setting_names(evaluation)),
                *(_cell(found.get(name)) for name in names),
                "-" if row.seconds_per_image is None else f"{row.seconds_per_image:.3f}",
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in lines)


def _setting_names(evaluation: Evaluation) -> list[str]:
    """In a sweep, what differs between its rows."""
    if evaluation.kind == "matrix":
        return []
    names = ("category", "guidance", "steps", "sampler", "aug_level")
    return [name for name in names if len({json.dumps(row.settings.get(name)) for row in evaluation.rows}) > 1]


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ",".join("-" if item is None else f"{item}" for item in value)
    return "-" if value is None else f"{value}"


def _cell(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "-"
    number = float(value["value"])
    if value.get("low") is None:
        return f"{number:.4g}"
    return f"{number:.4g} ({float(value['low']):.4g} to {float(value['high']):.4g})"


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


def _extractors(request: Request) -> tuple[list[Any], Any]:
    from imagen_lightning.metrics import features

    extractors: list[Any] = []
    if request.inception is not None:
        path = None if request.inception == "download" else Path(request.inception)
        extractors.append(features.InceptionFeatures(path))
    extractors += [features.load_extractor(Path(path), request.trust) for path in request.features]
    if not extractors:
        extractors.append(features.RandomConvFeatures())
    clip = features.ClipFeatures(request.clip) if request.clip is not None else None
    for extractor in [*extractors, *([clip] if clip is not None else [])]:
        extractor.sha256  # noqa: B018  (what cannot be had is refused before anything is drawn)
    return extractors, clip


def _identity(folder: Path) -> str:
    """A hash of the manifest's weights: a cascade that is trained on becomes another one."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    facts = [(entry["name"], entry["weights"]["sha256"]) for entry in manifest["stages"]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _begin(out: Path, request: Request, identity: str, data: str) -> None:
    """Makes `out`, or checks that it holds this very evaluation.

    Raises:
        InputError: it holds something else; the message names what differs.
    """
    plan = {key: value for key, value in asdict(request).items() if key not in _FREE}
    plan = json.loads(json.dumps(plan | {"cascade_sha256": identity, "data_sha256": data}))
    path = out / PLAN
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise InputError(f"{path} cannot be read; give another --out, or delete {out}") from None
        for key in plan:
            if found.get(key) != plan[key]:
                raise InputError(
                    f"--out {str(out)!r} holds another evaluation: its {key} is {found.get(key)!r}, this one's "
                    f"{plan[key]!r}; give another folder"
                )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {str(out)!r} is not empty and holds no evaluation; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, plan)


@contextmanager
def _processes() -> Iterator[tuple[Part, Callable[[], None]]]:
    """This process's part, and how it waits for the others."""
    part = Part.of_environment()
    if part.world_size == 1:
        yield part, lambda: None
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))  # one may draw far longer than another
    try:
        yield part, dist.barrier
    finally:
        dist.destroy_process_group()


def _draw(drawing: Drawing, wanted: Sequence[Chain]) -> None:
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


def _picture(drawing: Drawing, chain: Chain, out: Path) -> None:
    drawn = drawing.draw(chain)
    save_picture(drawn, drawing.data.captions, out / "samples" / f"{drawn.folder.name}.png")


def _sweep_verdict(rows: Sequence[Row], measured: Sequence[Measured], measurer: Measurer) -> str:
    """The best point by the first judge, and the points that no other beats in quality and time."""
    judges = measurer.judges(measured)
    if not judges:
        return "nothing was measured: these prompts have no real images; give --clip for the CLIP score"
    judge = judges[0]
    sign = 1 if judge.higher_is_better else -1
    quality = [sign * item.number(judge.metric) for item in measured]
    best = max(range(len(rows)), key=quality.__getitem__)
    front = pareto(quality, [row.seconds_per_image or 0.0 for row in rows])
    value = measured[best].value(judge.metric)
    equal = [
        i
        for i, item in enumerate(measured)
        if i != best and value.low is not None and value.low <= item.number(judge.metric) <= (value.high or value.value)
    ]
    note = f"; within its interval: {counted(len(equal), 'other point')}" if equal else ""
    return (
        f"best {judge.metric}: {_cell(value.to_json())} at {_words(rows[best])}{note}; best for their time: "
        + " / ".join(f"{_words(rows[i])} ({measured[i].number(judge.metric):.3g})" for i in front)
    )


def _words(row: Row) -> str:
    parts = [f"{name} {_short(row.settings.get(name))}" for name in ("guidance", "steps", "aug_level", "sampler")]
    return ", ".join(parts)


def _save_best(
    cascade: Cascade,
    request: Request,
    chosen: Sequence[tuple[StageSettings, ...]],
    rows: Sequence[Row],
    measured: Sequence[Measured],
    measurer: Measurer,
) -> dict[str, Any]:
    """Writes the best point into the manifest and returns it with its evidence."""
    judge: Judge = measurer.judge_of(str(request.save_best))
    sign = 1 if judge.higher_is_better else -1
    best = max(range(len(chosen)), key=lambda number: sign * measured[number].number(judge.metric))
    value = measured[best].value(judge.metric)
    whole = [row for row in rows if row.input == "chain" or len(cascade.stages) == 1]
    evidence = {
        "chosen_by": judge.metric,
        "points": len(chosen),
        "data": request.data or request.prompts,
        "settings": dict(whole[best].settings),
        "value": value.to_json(),
    }
    cascade.set_defaults(chosen[best], [evidence])
    cascade.save_manifest(request.cascade)
    return evidence | {"words": f"{_words(whole[best])} with {judge.metric} {_cell(value.to_json())}"}


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
