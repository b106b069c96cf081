"""`imagen-lightning shards doctor`: what a set of shards holds and what to mend, on a page and in the terminal."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from imagen_lightning.cli.arguments import WORKERS, Parser, file, folder
from imagen_lightning.cli.configs import find_config, read_config
from imagen_lightning.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from imagen_lightning.data.doctor import Contents, Stage
    from imagen_lightning.data.shards import Shards

_WITHOUT_LIMIT = 100_000


def main(argv: list[str]) -> int:
    """Runs `imagen-lightning shards doctor` with the arguments after that and returns the exit code."""
    arguments = parser().parse_args(argv)
    from imagen_lightning.data.doctor import examine
    from imagen_lightning.data.index import check_workers
    from imagen_lightning.report.doctor_page import doctor_page, summary
    from imagen_lightning.report.page import refuse_other

    refuse_other(arguments.out)
    check_workers(arguments.workers)
    stages = [_stage(text) for text in arguments.stage]
    found = examine(
        arguments.shards,
        stages,
        held_out=arguments.held_out or None,
        caption_field=arguments.caption_field,
        cache=arguments.cache,
        processes=arguments.workers,
    )
    size = doctor_page(found, _Pictures(arguments.cache)).write(arguments.out)
    print(summary(found))
    print(f"\nWrote {arguments.out} ({size / 2**20:.1f} MiB); open it in a browser")
    return 0


def parser() -> Parser:
    made = Parser(
        "shards doctor",
        description="Reads every sample once and writes a page: sizes, captions, metadata, samples that cannot be "
        "used, exact and near duplicates, leaks between training and held-out shards, a contact sheet, what to mend.",
    )
    made.add_argument("shards", nargs="+", metavar="SHARDS", help="paths, folders, globs, braces or addresses")
    made.add_argument(
        "--stage",
        action="append",
        default=[],
        metavar="YAML|PX",
        help="a stage's experiment file, or a size in pixels, to be trained on them; may be given several times",
    )
    made.add_argument("--held-out", action="append", default=[], metavar="SHARDS", help="kept for evaluation: leaks?")
    made.add_argument("--caption-field", metavar="NAME", help="the json field of the captions (default: the txt)")
    made.add_argument("--cache", type=folder, metavar="DIR", help="folder for remote shards and indexes")
    made.add_argument(
        "--workers", type=WORKERS, default=os.cpu_count() or 1, metavar="N", help="processes (default %(default)s)"
    )
    made.add_argument("--out", type=file, default=Path("doctor.html"), metavar="FILE", help="default %(default)s")
    return made


def _stage(text: str) -> Stage:
    """A stage of a size, or of an experiment's YAML with its text encoder's tokenizer."""
    from imagen_lightning.data.doctor import Stage

    if re.fullmatch(r"[1-9][0-9]{0,5}", text):
        return Stage(f"{text} px", int(text))
    config = read_config(find_config(text))
    try:
        arguments = config["model"]["init_args"]
        size = int(arguments["image_size"])
        encoder = (arguments.get("text") or {}).get("encoder")
        settings = dict(encoder["init_args"] or {}) if encoder and "init_args" in encoder else {}
        encoder = encoder and {"class_path": encoder["class_path"]}
    except (TypeError, KeyError, ValueError, OverflowError, AttributeError):
        raise InputError(
            f"--stage {text!r} is not a stage's YAML: it needs model.init_args.image_size, and where it has a text "
            "encoder that one's class_path"
        ) from None
    if not encoder:
        return Stage(Path(text).stem, size)
    from imagen_lightning.components import build

    limit = build({**encoder, "init_args": settings}).max_tokens
    longer = {"max_tokens": _WITHOUT_LIMIT} | ({"padding": "masked"} if "padding" in settings else {})
    whole = build({**encoder, "init_args": settings | longer})
    return Stage(Path(text).stem, size, whole.num_tokens, limit)


class _Pictures:
    """Reads a sample's picture again, each shard being opened once."""

    def __init__(self, cache: Path | None) -> None:
        self.cache = cache
        self._shards: dict[str, Shards] = {}

    def __call__(self, contents: Contents, row: int) -> Image.Image:
        from imagen_lightning.data.decode import decode_image
        from imagen_lightning.data.shards import IMAGE, open_shards

        name = contents.shards[contents.shard[row]]
        if name not in self._shards:
            self._shards[name] = open_shards(name, cache=self.cache)
        return decode_image(self._shards[name].read(0, int(contents.rows[row]), IMAGE) or b"")
