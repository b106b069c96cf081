"""`imagen-lightning sample FOLDER --prompt "…" --out DIR`: pictures from a cascade."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagen_lightning import __version__
from imagen_lightning.cli.arguments import NUM_IMAGES, Parser, captions_of, folder, refuse_many
from imagen_lightning.errors import InputError, counted

if TYPE_CHECKING:
    from PIL import Image

    from imagen_lightning.cascade import Samples

RECORD = "samples.json"
GRID_IMAGES = 64
GRID_WIDTH = 6
GRID_CELL = 192


def parser() -> Parser:
    made = Parser("sample", description="Draws pictures from a cascade folder.")
    made.add_argument("cascade", metavar="FOLDER", help="a cascade folder")
    made.add_argument("--prompt", metavar="CAPTION", action="append", default=[], help="may be given several times")
    made.add_argument(
        "--prompts", metavar="FILE", help="captions, one a line; or a .csv, .tsv or .jsonl with a prompt column"
    )
    made.add_argument("--num-images", type=NUM_IMAGES, default=1, metavar="N", help="images a caption (default 1)")
    made.add_sampling("guidance", "steps", "sampler", "aug-level")
    made.add_argument("--negative-prompt", metavar="CAPTION", help="what to steer away from, where guidance is not 1")
    made.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the weights in memory: half of it for a half type (default: the files' own)",
    )
    made.add_argument("--low-res", metavar="FILE", help="a square picture to start from; with --start-stage")
    made.add_argument(
        "--start-stage",
        metavar="STAGE",
        help="number or name of the first stage to run (default 0; with --low-res the first super-resolution)",
    )
    made.add_argument(
        "--out",
        type=folder,
        metavar="DIR",
        help="folder for 00000.png …, grid.png, samples.json (default: the first of samples/0001 … that is not there)",
    )
    made.add_trust()
    return made


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    with _own_folder(arguments.out) as out:
        return _sample(arguments, out)


def _sample(arguments: argparse.Namespace, out: Path) -> int:
    prompts = captions_of(arguments.prompt, arguments.prompts, missing=None)
    refuse_many(len(prompts), arguments.num_images)
    low_res = _read_picture(arguments.low_res) if arguments.low_res is not None else None

    import torch
    from tqdm import tqdm

    from imagen_lightning.cascade import Cascade
    from imagen_lightning.cascade.origin import weights_kind
    from imagen_lightning.cascade.sampling import text_identity
    from imagen_lightning.finetuning.class_images import weights_of
    from imagen_lightning.images import from_pil
    from imagen_lightning.metrics.digests import digest_tensors

    sha256 = weights_of(arguments.cascade)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cascade = Cascade.load(arguments.cascade, device, trust=arguments.trust, dtype=arguments.dtype)
    if not prompts:
        if any(stage.text.encoder is not None for stage in cascade.stages):
            raise InputError("there are no captions; give --prompt or --prompts")
        prompts = [""]
    captions = [prompt for prompt in prompts for _ in range(arguments.num_images)]
    start_stage = arguments.start_stage
    if start_stage is None:
        start_stage = 1 if low_res is not None and cascade.names[0] == "base" else 0

    with ExitStack() as stack:
        bar: Any = None

        def progress(done: int, total: int, stage: str) -> None:
            nonlocal bar
            if bar is None:  # what is refused shows none
                bar = stack.enter_context(tqdm(unit="step", total=total))
            bar.set_description(stage, refresh=False)
            bar.update(done - bar.n)

        samples = cascade.sample(
            captions,
            seed=arguments.seed,
            guidance=arguments.guidance,
            steps=arguments.steps,
            sampler=arguments.sampler,
            aug_level=arguments.aug_level,
            negative=arguments.negative_prompt,
            images=[low_res] * len(captions) if low_res is not None else None,
            start_stage=start_stage,
            batch_size=arguments.batch_size,
            precision=arguments.precision,
            progress=progress,
        )
    files = [f"{index:05d}.png" for index in range(len(captions))]
    stages = cascade.stages[len(cascade.stages) - len(samples.settings) :]
    record = {
        "cascade": arguments.cascade,
        "versions": {"imagen_lightning": __version__, "torch": torch.__version__},
        "device": str(cascade.device),
        "precision": arguments.precision,
        "dtype": arguments.dtype,
        "batch_size": arguments.batch_size,
        "negative_prompt": arguments.negative_prompt,
        "low_res": arguments.low_res,
        "low_res_sha256": None if low_res is None else digest_tensors([from_pil(low_res)]),
        "stages": [
            {
                **setting.described(),
                "weights": {
                    "kind": weights_kind(stage),
                    **(stage.weights_record or {}),
                    "sha256": sha256[setting.stage],
                },
                "text": text_identity(stage),
            }
            for setting, stage in zip(samples.settings, stages)
        ],
        "samples": [
            {"file": file, "prompt": caption, "seed": arguments.seed, "index": index}
            for index, (file, caption) in enumerate(zip(files, captions))
        ],
    }
    _write(out, files, samples, captions, record)
    print(f"Wrote {counted(len(captions), 'image')}, grid.png and samples.json to {out}")
    return 0


@contextlib.contextmanager
def _own_folder(given: Path | None) -> Iterator[Path]:
    """Give the folder to write into, which no other `sample` has meanwhile; folders that get nothing vanish again.

    Raises:
        InputError: it holds samples, cannot be written, or another process has it.
    """
    from imagen_lightning.io.locks import LOCK, locked

    out = _free_folder() if given is None else given
    _refuse_used(out)
    with ExitStack() as stack:
        try:
            made: list[Path] = []
            while not out.is_dir() or given is None:
                made = [path for path in (out, *out.parents) if not path.exists()]
                try:
                    out.mkdir(parents=True, exist_ok=given is not None)
                    break
                except FileExistsError:  # another `sample` has just taken it
                    out = _free_folder()
            for folder in reversed(made):
                stack.callback(_remove_empty, folder)
            stack.enter_context(locked(out / LOCK, f"--out {str(out)!r}", advice="give another folder"))
        except OSError as error:
            raise InputError(f"--out {str(out)!r} cannot be written: {error.strerror or error}") from error
        stack.callback((out / LOCK).unlink, missing_ok=True)
        _refuse_used(out)
        yield out


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it holds something now
        folder.rmdir()


def _free_folder() -> Path:
    return next(path for number in count(1) if not (path := Path("samples", f"{number:04d}")).exists())


def _refuse_used(out: Path) -> None:
    """Raise InputError where `out` holds samples, before time is spent on sampling."""
    used = sorted([*out.glob(RECORD), *out.glob("*.png")])
    if used:
        raise InputError(f"--out {str(out)!r} holds earlier samples ({used[0].name}); give another folder")


def _read_picture(file: str) -> Image.Image:
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = (
            "no such file" if isinstance(error, FileNotFoundError) else f"it is no picture that Pillow reads ({error})"
        )
        raise InputError(f"--low-res {file!r} cannot be read: {reason}") from error


def _write(out: Path, files: list[str], samples: Samples, captions: list[str], record: dict[str, Any]) -> None:
    """Puts pictures, grid and record into `out`, which may hold other files, once all are made, the record last."""
    from imagen_lightning.images import to_pil

    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".samples-", dir=out) as partial:
            for file, image in zip(files, samples.images):
                to_pil(image).save(Path(partial, file))
            _grid(samples, captions).save(Path(partial, "grid.png"))
            text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
            Path(partial, RECORD).write_text(text, encoding="utf-8")
            for file in (*files, "grid.png", RECORD):
                Path(partial, file).replace(out / file)
    except OSError as error:
        raise InputError(f"--out {str(out)!r} cannot be written: {error.strerror}") from error


def _grid(samples: Samples, captions: list[str]) -> Image.Image:
    """The pictures of every stage side by side, final ones with their captions under them; the first GRID_IMAGES."""
    from imagen_lightning.images import grid

    num_stages, size = len(samples.stages), samples.images.shape[-1]
    count = min(len(captions), GRID_IMAGES)
    cells = [stage[index] for index in range(count) for stage in samples.stages]
    notes = [f"{setting.stage}, {stage.shape[-1]} px" for setting, stage in zip(samples.settings, samples.stages)]
    texts = [text for caption in captions[:count] for text in [*notes[:-1], caption]]
    width = num_stages * max(1, GRID_WIDTH // num_stages)
    rows = [cells[first : first + width] for first in range(0, len(cells), width)]
    return grid(rows, texts, cell=size * math.ceil(GRID_CELL / size))
