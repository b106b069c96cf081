"""Class images: what a cascade makes of a class's captions before it is fine-tuned, kept so that it is not forgotten.

Prior preservation of DreamBooth (Ruiz et al. 2022, arXiv 2208.12242, section 3.3). Each stage's own outputs are kept: a
base stage is then trained on what the base drew, and a super-resolution stage on what it made of that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from imagen_lightning import __version__
from imagen_lightning.cascade import Cascade, StageSettings
from imagen_lightning.cascade.manifest import read_manifest
from imagen_lightning.cascade.origin import descended
from imagen_lightning.cascade.sampling import find_stage, text_identity
from imagen_lightning.data.class_images import FORMAT, RECORD, VERSION, partial_folder, read_record
from imagen_lightning.errors import InputError
from imagen_lightning.files import plain, write_json, write_text
from imagen_lightning.images import save_png, to_pil
from imagen_lightning.io.locks import holder_path, locked

REQUEST, LOCK = "request.json", ".lock"
_NAMES = {
    **{"prompts": "captions", "num": "number", "stages": "sampling"},
    **{"weights": "weights of the cascade", "text": "text encoder"},
}


@dataclass(frozen=True)
class Drawn:
    """What was drawn.

    Attributes:
        folder: where the class images lie.
        num: images of each stage.
        num_made: how many of them this call drew; the others were there.
        stages: names, the folders in it.
    """

    folder: Path
    num: int
    num_made: int
    stages: list[str]


def weights_of(folder: str | Path) -> dict[str, list[str]]:
    """The SHA-256 of the files of each stage's weights in a cascade folder, by the stage's name."""
    path, manifest = read_manifest(folder)
    return {entry["name"]: descended(entry, path)["parents"][0]["sha256"] for entry in manifest["stages"]}


def draw_class_images(
    cascade: Cascade,
    out: str | Path,
    prompts: Sequence[str],
    num: int,
    *,
    weights: Mapping[str, Sequence[str]],
    seed: int = 0,
    guidance: Any = None,
    steps: Any = None,
    sampler: Any = None,
    aug_level: Any = None,
    last_stage: int | str | None = None,
    batch_size: int = 32,
    precision: str = "32",
    progress: Callable[[int], object] = lambda done: None,
) -> Drawn:
    """Draws `num` images with captions into a folder, whole or not at all.

    Until all are there they lie in `OUT.partial`; called again with the same arguments after any stop, it goes on with
    the batches that are missing. Image i has caption i modulo their number, and its noise from (seed, i, stage) alone.

    Args:
        cascade: on its device.
        out: the folder to make.
        prompts: captions of the class, one or more.
        num: images of each stage.
        weights: what tells the cascade's weights from others' (see `weights_of`).
        seed, guidance, steps, sampler, aug_level, batch_size, precision: see `Cascade.sample`.
        last_stage: number or name of the last stage that draws; by default the cascade's last.
        progress: called with the number of images drawn, after each batch.

    Raises:
        InputError: a value out of range; `out` or its partial folder holds something else; another process draws the
            same; a folder that cannot be written. What is drawn stays.
    """
    out = Path(out).expanduser()
    if num < 1:
        raise InputError(f"number of class images {num} must be at least 1")
    if cascade.names[0] != "base":
        raise InputError(
            "the cascade begins with super-resolution, which needs images; give one that begins with a base"
        )
    stop = len(cascade.stages) if last_stage is None else find_stage(cascade.names, last_stage) + 1
    settings = cascade.settings(guidance, steps, sampler, aug_level)[:stop]
    request: dict[str, Any] = {
        "prompts": list(prompts),
        "num": num,
        "seed": seed,
        "precision": precision,
        "stages": [_described(cascade, number, setting) for number, setting in enumerate(settings)],
        "weights": {setting.stage: weights.get(setting.stage) for setting in settings},
        "text": {setting.stage: text_identity(stage) for setting, stage in zip(settings, cascade.stages)},
    }
    request = json.loads(json.dumps(plain(request)))  # as it is read back
    names = [setting.stage for setting in settings]
    if _is_finished(out, request):
        return Drawn(out, num, 0, names)
    partial = partial_folder(out)
    try:
        with locked(partial / LOCK, f"class images {str(out)!r}"):
            if _is_finished(out, request):  # by another process meanwhile
                return Drawn(out, num, 0, names)
            _begin(partial, request)
            made = 0
            for rows in _missing(partial, names, num, batch_size):
                indices = range(rows.start, rows.stop)
                captions = [prompts[index % len(prompts)] for index in indices]
                samples = cascade.sample(
                    captions,
                    seed=seed,
                    guidance=guidance,
                    steps=steps,
                    sampler=sampler,
                    aug_level=aug_level,
                    last_stage=stop - 1,
                    batch_size=batch_size,
                    first_index=rows.start,
                    precision=precision,
                )
                for name, images in zip(names, samples.stages):
                    for index, caption, image in zip(indices, captions, images):
                        write_text(partial / name / f"{index:05d}.txt", caption + "\n")
                        save_png(to_pil(image), partial / name / f"{index:05d}.png")
                made += len(indices)
                progress(rows.stop)
            _finish(partial, out, {**request, "batch_size": batch_size, "device": str(cascade.device)})
    except OSError as error:
        raise InputError(f"class images {str(out)!r} cannot be written: {error.strerror or error}") from error
    return Drawn(out, num, made, names)


def _described(cascade: Cascade, number: int, setting: StageSettings) -> dict[str, Any]:
    return {**setting.described(), "image_size": cascade.stages[number].image_size}


def _is_finished(out: Path, request: Mapping[str, Any]) -> bool:
    """Whether the folder holds what is asked for already.

    Raises:
        InputError: it holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    record = read_record(out) if out.is_dir() else None
    if record is None:
        raise InputError(f"{str(out)!r} is there and holds no class images; give another folder")
    _compare(record, request, f"{str(out)!r} holds other class images", "give another folder")
    return True


def _begin(partial: Path, request: dict[str, Any]) -> None:
    """Notes what is drawn, or compares it with what was begun."""
    path = partial / REQUEST
    if not path.exists():
        write_json(path, request)
        return
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{path} is damaged; delete {str(partial)!r} and draw anew") from None
    mend = f"give the same arguments to go on, or delete {str(partial)!r}"
    _compare(begun, request, f"{str(partial)!r} was begun for other class images", mend)


def _compare(there: Mapping[str, Any], request: Mapping[str, Any], problem: str, mend: str) -> None:
    for name, wanted in request.items():
        if there.get(name) != wanted:
            was, now = (_short(value) for value in (there.get(name), wanted))
            raise InputError(f"{problem}: {_NAMES.get(name, name)} is {was} there and {now} now; {mend}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:120] + "…"


def _missing(partial: Path, names: Sequence[str], num: int, batch_size: int) -> Iterator[slice]:
    """Whole batches, so that a drawing that was stopped gives the bits of one that was not."""
    for start in range(0, num, batch_size):
        rows = slice(start, min(start + batch_size, num))
        files = (partial / name / f"{index:05d}.png" for name in names for index in range(rows.start, rows.stop))
        if not all(file.exists() for file in files):
            yield rows


def _finish(partial: Path, out: Path, request: Mapping[str, Any]) -> None:
    record = {
        "format": FORMAT,
        "version": VERSION,
        "versions": {"imagen_lightning": __version__, "torch": torch.__version__},
        **request,
    }
    write_json(partial / RECORD, record)
    for path in (partial / REQUEST, holder_path(partial / LOCK), partial / LOCK):
        path.unlink()
    os.replace(partial, out)
