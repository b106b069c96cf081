"""`imagen-lightning shards verify`: every sample against the SHA-256 that its shard's index holds."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from imagen_lightning.cli.arguments import Parser
from imagen_lightning.cli.shards.index import add_shards, num_processes
from imagen_lightning.errors import InputError, counted

if TYPE_CHECKING:
    from imagen_lightning.data.index import ShardIndex
    from imagen_lightning.data.skips import Skip


@dataclass
class Finding:
    """What the reading of one shard found.

    Attributes:
        index: its index.
        bad: the samples that differ or cannot be read.
        changed: whether the shard's size or time of change differ from those that were indexed.
    """

    index: ShardIndex
    bad: list[Skip]
    changed: bool


def main(argv: list[str]) -> int:
    """Runs `imagen-lightning shards verify` with the arguments after that and returns the exit code."""
    arguments = parser().parse_args(argv)
    from imagen_lightning.data.index import cache_folder, map_shards
    from imagen_lightning.data.shard_cache import cache_size
    from imagen_lightning.data.shards import list_shards

    shards = list_shards(arguments.shards)
    cache = arguments.cache or cache_folder()
    job = partial(_verify, cache=cache, cache_bytes=cache_size(arguments.cache_gb))
    start = time.perf_counter()
    samples = size = 0
    reasons: Counter[str] = Counter()
    for finding in map_shards(job, shards, num_processes(shards, arguments.workers)):
        samples += finding.index.num_samples
        size += finding.index.size
        reasons.update(skip.reason.value for skip in finding.bad)
        if finding.changed:
            print(f"{finding.index.shard}: changed since it was indexed (size or time)")
        for skip in finding.bad:
            print(f"{skip}: {skip.reason.value}")
    seconds = time.perf_counter() - start
    found = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "all as they were indexed"
    print(f"{counted(len(shards), 'shard')}, {counted(samples, 'sample')}: {found}")
    print(f"{seconds:.2f} s: {samples / seconds:,.0f} samples/s, {size / 1e6 / seconds:,.0f} MB/s")
    return 1 if reasons else 0


def _verify(shard: str, *, cache: Path, cache_bytes: int) -> Finding:
    from imagen_lightning.data.index import index_files, is_fresh, read_indexes
    from imagen_lightning.data.remote import is_remote
    from imagen_lightning.data.shard_cache import ShardCache
    from imagen_lightning.data.shards import Shards

    if is_remote(shard):
        remote = ShardCache(cache, cache_bytes)
        remote.prepare()
        index = remote.open_index(shard)
        return Finding(index, Shards([index], "sha256", remote).damage(0), False)
    found = [index for index in read_indexes(shard, index_files(shard, cache)) if index.hashed]
    if not found:
        raise InputError(
            f"shard {shard!r} has no SHA-256 to be compared with; run `imagen-lightning shards index {shard}` first, "
            "while it is known to be good"
        )
    index = max(found, key=is_fresh)
    return Finding(index, Shards([index], "sha256").damage(0), not is_fresh(index))


def parser() -> Parser:
    parser = Parser(
        "shards verify",
        description="Reads every sample and compares it with the SHA-256 in its shard's index. Exit code 1 where any "
        "sample differs or cannot be read.",
    )
    add_shards(parser)
    return parser
