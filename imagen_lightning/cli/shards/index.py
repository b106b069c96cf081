"""`imagen-lightning shards index`: where each sample of each shard lies, and its SHA-256, kept beside the shards."""

from __future__ import annotations

import os
import time
from argparse import BooleanOptionalAction
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from imagen_lightning.cli.arguments import WORKERS, Parser, folder, real
from imagen_lightning.errors import counted

if TYPE_CHECKING:
    from imagen_lightning.data.index import ShardIndex

_MAX_LINES = 50  # shards that get a line each
_MIN_BYTES = 2**30  # from which on processes are started


def main(argv: list[str]) -> int:
    """Runs `imagen-lightning shards index` with the arguments after that and returns the exit code."""
    arguments = parser().parse_args(argv)
    from imagen_lightning.data.index import cache_folder, map_shards
    from imagen_lightning.data.shard_cache import cache_size
    from imagen_lightning.data.shards import list_shards

    shards = list_shards(arguments.shards)
    cache = arguments.cache or cache_folder()
    job = partial(
        _index, hashes=arguments.hashes, cache=cache, cache_bytes=cache_size(arguments.cache_gb), force=arguments.force
    )
    start = time.perf_counter()
    indexes = []
    for index in map_shards(job, shards, num_processes(shards, arguments.workers)):
        indexes.append(index)
        if len(shards) <= _MAX_LINES:
            print(_line(index))
    print(_summary(indexes, time.perf_counter() - start))
    return 0


def num_processes(shards: list[str], workers: int) -> int:
    """How many processes read shards; 0, for threads, where starting them would take longer, and for remote ones."""
    from imagen_lightning.data.index import check_workers
    from imagen_lightning.data.remote import is_remote

    check_workers(workers)
    if workers < 2 or len(shards) < 2 or any(map(is_remote, shards)):
        return 0
    return min(workers, len(shards)) if sum(map(os.path.getsize, shards)) >= _MIN_BYTES else 0


def _index(shard: str, *, hashes: bool, cache: Path, cache_bytes: int, force: bool) -> ShardIndex:
    from imagen_lightning.data.index import open_index
    from imagen_lightning.data.remote import is_remote
    from imagen_lightning.data.shard_cache import ShardCache

    if not is_remote(shard):
        return open_index(shard, hashes=hashes, cache=cache, force=force)
    remote = ShardCache(cache, cache_bytes)
    remote.prepare()
    return remote.open_index(shard, force)


def _line(index: ShardIndex) -> str:
    left_out = f", {len(index.skips)} left out" if index.skips else ""
    hashed = "with SHA-256" if index.hashed else "no SHA-256"
    return f"{index.shard}: {counted(index.num_samples, 'sample')}{left_out}, {index.size / 1e6:.1f} MB, {hashed}"


def _summary(indexes: list[ShardIndex], seconds: float) -> str:
    samples, size = sum(index.num_samples for index in indexes), sum(index.size for index in indexes)
    from imagen_lightning.data.skips import counted_by_kind

    members: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    for index in indexes:
        members.update(index.members)
        unread.update(index.unread)
        faults.update(skip.reason.value for skip in index.skips)
        faults.update({reason.value: count for reason, count in index.missing().items() if count})
    fields = sorted({name for index in indexes for name in index.fields})
    lines = [
        f"{counted(len(indexes), 'shard')}, {counted(samples, 'sample')}, {size / 1e6:.1f} MB",
        "members: " + (counted_by_kind({suffix: members[suffix] for suffix in members.keys() - unread}) or "none"),
        *([f"members not read: {counted_by_kind(unread)}"] if unread else []),
        "fields of the json: " + (", ".join(fields) or "none"),
        "faults: " + (", ".join(f"{count} {reason}" for reason, count in faults.most_common()) or "none"),
        f"{seconds:.2f} s: {samples / seconds:,.0f} samples/s, {size / 1e6 / seconds:,.0f} MB/s",
    ]
    return "\n".join(lines)


def parser() -> Parser:
    parser = Parser(
        "shards index",
        description="Finds where each sample of each shard lies, and takes its SHA-256, so that training starts at "
        "once and `shards verify` and LaionDataModule(verify='sha256') can tell damage. An index lies beside its "
        "shard as SHARD.index, or in the cache folder where that cannot be written. Indexes that are there and fit "
        "are left as they are.",
    )
    add_shards(parser)
    parser.add_argument(
        "--hashes", action=BooleanOptionalAction, default=True, help="take the SHA-256 of each sample (on)"
    )
    parser.add_argument("--force", action="store_true", help="make the indexes anew, as after shards were rewritten")
    return parser


def add_shards(parser: Parser) -> None:
    """The arguments that `index` and `verify` share."""
    parser.add_argument(
        "shards",
        nargs="+",
        metavar="SHARDS",
        help="paths, folders, globs or braces such as 'train-{00000..00009}.tar', or addresses (https, s3, gs, …)",
    )
    parser.add_argument(
        "--cache",
        type=folder,
        metavar="DIR",
        help="for remote shards and for indexes that cannot lie beside their shards",
    )
    parser.add_argument(
        "--cache-gb", type=real(0, 10**6), default=20.0, metavar="GB", help="of remote shards kept there (%(default)s)"
    )
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--workers", type=WORKERS, default=workers, metavar="N", help="processes (%(default)s)")
