"""`imagen-lightning shards`: captioned images to shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from imagen_lightning.cli.arguments import Parser
from imagen_lightning.errors import counted


def main(argv: list[str]) -> int:
    """Runs `imagen-lightning shards` with the arguments after that and returns the exit code."""
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
    parser = Parser("shards", description="Shards of captioned images.")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True, parser_class=VerbParser)
    write = verbs.add_parser(
        "write",
        help="make shards of a folder or table of captioned images",
        description="Makes shards (tar files in webdataset's layout) of a folder or table of captioned images.",
    )
    write.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a folder of images with a .txt of the same name beside each, or a .csv, .tsv, .jsonl or .parquet file "
        "with an image and a caption column; images are paths relative to the file (in parquet, bytes too)",
    )
    write.add_argument("out", type=Path, metavar="OUT", help="the folder to write; it must hold no shards")
    write.add_argument("--shard-size", type=int, default=1000, metavar="N", help="samples of a shard (%(default)s)")
    write.add_argument("--max-side", type=int, metavar="PX", help="reduce images to this longest side")
    write.add_argument("--image-column", metavar="NAME", help="the table's column of images (found by its usual names)")
    write.add_argument("--caption-column", metavar="NAME", help="the table's column of captions (likewise)")
    write.add_argument(
        "--held-out",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="share of the samples that goes to heldout-*.tar, chosen by a hash of the image's name (%(default)s)",
    )
    write.add_argument(
        "--quality", type=int, default=95, metavar="Q", help="of images encoded anew, 1 to 100 (%(default)s)"
    )
    return parser


class VerbParser(Parser):
    """The parser of a verb below `shards`, as argparse makes it."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog.removeprefix("imagen-lightning "), **kwargs)
