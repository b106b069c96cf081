"""`imagen-lightning shards write`: captioned images to shards."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from imagen_lightning.cli.arguments import FRACTION, WORKERS, Parser, folder, whole
from imagen_lightning.errors import counted


def main(argv: list[str]) -> int:
    """Runs `imagen-lightning shards write` with the arguments after that and returns the exit code."""
    arguments = parser().parse_args(argv)
    from imagen_lightning.data.ingest import GOES_ON, SKIPPED, write_shards

    try:
        with _ended_by_sigterm():
            written = write_shards(
                arguments.source,
                arguments.out,
                shard_size=arguments.shard_size,
                max_side=arguments.max_side,
                short_side=arguments.short_side,
                image_format=arguments.format,
                quality=arguments.quality,
                filter=arguments.filter,
                image_column=arguments.image_column,
                caption_column=arguments.caption_column,
                held_out=arguments.held_out,
                held_out_by=arguments.held_out_by,
                workers=arguments.workers,
            )
    except KeyboardInterrupt as stop:
        print(f"imagen-lightning: stopped; {GOES_ON}", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    if not written.num_made:
        print(f"{str(arguments.out)!r} is finished already: nothing to do")
    for split, count in written.samples.items():
        if count:
            print(f"{split}: {counted(count, 'sample')} in {counted(written.shards[split], 'shard')}")
    listed = written.skipped or written.filtered
    print(f"{written}" + (f"; listed in {arguments.out / SKIPPED}" if listed else ""))
    if written.samples["train"]:
        print(f"train on them with LaionDataModule(train={str(arguments.out / 'train-*.tar')!r})")
    else:
        print("all samples are held out: give a smaller --held-out, or another --held-out-by, and another folder")
    return 0


class Terminated(KeyboardInterrupt):
    """SIGTERM."""


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM stops the context as Ctrl-C does."""

    def stop(*_: object) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def parser() -> Parser:
    made = Parser(
        "shards write",
        description="Makes shards (tar files in webdataset's layout) of captioned images. Stopped at any moment and "
        "given again, a command goes on with the shards that are missing.",
    )
    made.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a folder or .zip of images with a .txt of the same name beside each, or with a metadata.csv, .jsonl or "
        ".parquet; a .csv, .tsv, .jsonl, .parquet or .arrow file with an image and a caption column, images being "
        "paths relative to the file (in parquet and arrow, bytes too); a folder of parquet files, or one that Hugging "
        "Face's save_to_disk wrote",
    )
    made.add_argument(
        "out", type=folder, metavar="OUT", help="the folder to write; it must hold no shards but those of this command"
    )
    made.add_argument(
        "--workers",
        type=WORKERS,
        metavar="N",
        help="processes that make shards, 0 for none beside this one (one a processor, fewer for few images)",
    )
    made.add_argument(
        "--shard-size",
        type=whole(1, 10_000_000),
        default=1000,
        metavar="N",
        help="images of a shard, before those that cannot be used are left out (%(default)s)",
    )
    images = made.add_argument_group("images")
    images.add_argument("--max-side", type=whole(1, 2**16), metavar="PX", help="reduce images to this longest side")
    images.add_argument("--short-side", type=whole(1, 2**16), metavar="PX", help="reduce images to this shorter side")
    images.add_argument(
        "--format",
        choices=("keep", "jpg", "png", "webp"),
        default="keep",
        help="of the stored images; keep stores JPEG, PNG and WebP in their format, others as PNG (%(default)s)",
    )
    images.add_argument(
        "--quality", type=whole(1, 100), default=95, metavar="Q", help="of images encoded anew, 1 to 100 (%(default)s)"
    )
    records = made.add_argument_group("records")
    records.add_argument("--image-column", metavar="NAME", help="the table's column of images (by its usual names)")
    records.add_argument(
        "--caption-column",
        metavar="NAME",
        action="append",
        help="the table's column of captions, strings or lists of them (by its usual names); several times for several",
    )
    records.add_argument(
        "--filter",
        metavar="CONDITIONS",
        help="keep what meets them, such as min_side=256,language=en; sizes are those before images are reduced",
    )
    records.add_argument(
        "--held-out",
        type=FRACTION,
        default=0.0,
        metavar="FRACTION",
        help="share of the samples that goes to heldout-*.tar, chosen by a hash of the image's name (%(default)s)",
    )
    records.add_argument(
        "--held-out-by",
        metavar="FIELD",
        help="choose by a hash of this column instead: what has one value falls on one side (of images without a "
        "table: folder or caption)",
    )
    return made
