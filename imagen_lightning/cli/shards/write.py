"""`imagen-lightning shards write`: captioned images to shards."""

from __future__ import annotations

from pathlib import Path

from imagen_lightning.cli.arguments import Parser
from imagen_lightning.errors import counted


def main(argv: list[str]) -> int:
    """Runs `imagen-lightning shards write` with the arguments after that and returns the exit code."""
    arguments = _parser().parse_args(argv)
    from imagen_lightning.data.ingest import write_shards

    counts, skips = write_shards(
        arguments.source,
        arguments.out,
        shard_size=arguments.shard_size,
        max_side=arguments.max_side,
        image_column=arguments.image_column,
        caption_column=arguments.caption_column,
        held_out=arguments.held_out,
        quality=arguments.quality,
    )
    for split, count in counts.items():
        if count:
            num_shards = len(list(arguments.out.glob(f"{split}-*.tar")))
            print(f"{split}: {counted(count, 'sample')} in {counted(num_shards, 'shard')}")
    print(skips.summary() + (f"; listed in {arguments.out / 'skipped.jsonl'}" if skips.counts else ""))
    print(f"train on them with LaionDataModule(train={str(arguments.out / 'train-*.tar')!r})")
    return 0


def _parser() -> Parser:
    parser = Parser(
        "shards write",
        description="Makes shards (tar files in webdataset's layout) of a folder or table of captioned images.",
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a folder of images with a .txt of the same name beside each, or a .csv, .tsv, .jsonl or .parquet file "
        "with an image and a caption column; images are paths relative to the file (in parquet, bytes too)",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write; it must hold no shards")
    parser.add_argument("--shard-size", type=int, default=1000, metavar="N", help="samples of a shard (%(default)s)")
    parser.add_argument("--max-side", type=int, metavar="PX", help="reduce images to this longest side")
    parser.add_argument("--image-column", metavar="NAME", help="the table's column of images (by its usual names)")
    parser.add_argument("--caption-column", metavar="NAME", help="the table's column of captions (likewise)")
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="share of the samples that goes to heldout-*.tar, chosen by a hash of the image's name (%(default)s)",
    )
    parser.add_argument(
        "--quality", type=int, default=95, metavar="Q", help="of images encoded anew, 1 to 100 (%(default)s)"
    )
    return parser
