"""Folders, tables, archives and saved datasets of captioned images to shards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from imagen_lightning.data.filters import Filter, FilterCounts
from imagen_lightning.data.index import check_workers
from imagen_lightning.data.ingest.lock import FolderLock, locked
from imagen_lightning.data.ingest.making import Job, Progress, make_shards
from imagen_lightning.data.ingest.plan import SKIPPED, SPLITS, Out, Task, list_records
from imagen_lightning.data.ingest.samples import ImageSettings
from imagen_lightning.data.ingest.sources import open_source
from imagen_lightning.data.skips import counted_by_kind
from imagen_lightning.errors import InputError, counted

__all__ = ["GOES_ON", "SKIPPED", "Written", "write_shards"]

GOES_ON = "the shards that are there are whole, and the same command goes on with the others"

_WORTH_A_WORKER = 500  # images: fewer are made before it has started


@dataclass(frozen=True)
class Written:
    """What a folder of shards holds.

    Attributes:
        samples: number of samples by split.
        shards: number of shards by split.
        skipped: number of records that could not be used, by reason.
        filtered: number of records that the filter removed, by the first condition that did.
        unread: number of files of the source that are no images and no part of one, by kind.
        num_made: number of shards that this run made.
    """

    samples: dict[str, int]
    shards: dict[str, int]
    skipped: dict[str, int]
    filtered: dict[str, int]
    unread: dict[str, int]
    num_made: int

    def __str__(self) -> str:
        """ "12 samples skipped: 10 undecodable image, 2 bad JSON", and what the filter did, if there was one."""
        parts = counted_by_kind(self.skipped)
        text = f"{counted(sum(self.skipped.values()), 'sample')} skipped" + (f": {parts}" if parts else "")
        if self.filtered:
            seen = sum(self.samples.values()) + sum(self.filtered.values())
            text += f"; filter: {FilterCounts(seen, _leading(self.filtered))}"
        if self.unread:
            text += f"; {counted(sum(self.unread.values()), 'other file')} not read: {counted_by_kind(self.unread)}"
        return text


def write_shards(
    source: Path,
    out: Path,
    *,
    shard_size: int = 1000,
    max_side: int | None = None,
    short_side: int | None = None,
    image_format: str = "keep",
    quality: int = 95,
    filter: str | None = None,
    image_column: str | None = None,
    caption_column: str | Sequence[str] | None = None,
    held_out: float = 0.0,
    held_out_by: str | None = None,
    workers: int | None = 0,
    progress: bool = True,
) -> Written:
    """Writes captioned images as `train-NNNNN.tar` and `heldout-NNNNN.tar`.

    First the records are listed and each is given to a split and a shard; the plan is `out/plan.json`. Then each shard
    is made, whole or not at all. Stopped at any moment and called again with the same arguments, it goes on with the
    shards that are missing; the bytes are those of a run that was not stopped, whatever the number of workers. What
    was left out is counted and listed in `out/skipped.jsonl`. Each sample's json holds the caption, the image's name
    and size, and the table's other columns.

    Args:
        source: see `sources.open_source`.
        out: the folder to write, made if need be; it must hold no shards but those of the same call.
        shard_size: records of a shard, which has fewer samples where some of them are left out.
        max_side: longest side in pixels; larger images are reduced by the area filter and encoded anew.
        short_side: shorter side in pixels, likewise, in place of `max_side`.
        image_format: see `samples.ImageSettings`.
        quality: of JPEG and WebP images that are encoded anew, 1 to 100.
        filter: conditions on the metadata, and on the size before reduction, such as "min_side=256,language=en"; see
            `imagen_lightning.data.filters.Filter`.
        image_column: default: the first of `tables.IMAGE_COLUMNS` that there is.
        caption_column: one or several; default: the first of `tables.CAPTION_COLUMNS` that there is. Each holds
            strings, or lists of strings.
        held_out: share in [0, 1) of samples that go to held-out shards, chosen by a hash of the image's name.
        held_out_by: a field whose hash chooses instead, so that all records of one value fall on one side; those
            without a value go by the name. Of images without a table: "folder" or "caption".
        workers: processes that make shards; 0 makes them in this one; None takes one a processor, fewer where there
            are few images or shards to make, and this process in place of one.
        progress: show a bar where the error output is a terminal.

    Raises:
        InputError: an unreadable source, missing columns, nothing usable, a value out of range, another call's shards
            in `out`, another process at work there, or a folder that cannot be written. Shards that are there are
            whole, and the same call goes on.
    """
    if shard_size < 1:
        raise InputError(f"shard size {shard_size} must be at least 1")
    if not 0 <= held_out < 1:
        raise InputError(f"held-out share {held_out} must be at least 0 and below 1")
    if held_out_by is not None and held_out == 0:
        raise InputError(f"held-out by {held_out_by!r} needs a held-out share above 0")
    if workers is not None:
        check_workers(workers)
    images = ImageSettings(max_side, short_side, image_format, quality)
    conditions = None if filter is None else Filter.parse(filter)
    captions = [caption_column] if isinstance(caption_column, str) else list(caption_column or ())
    options = {
        "shard-size": shard_size,
        **{name.replace("_", "-"): value for name, value in asdict(images).items()},
        "filter": None if conditions is None else str(conditions),
        "image-column": image_column,
        "caption-column": captions,
        "held-out": held_out,
        "held-out-by": held_out_by,
    }
    begun = False
    try:
        with locked(out) as lock:
            folder = Out(out, {"source": str(source.resolve()), "options": options})
            records = open_source(source, image_column, captions)
            listing = list_records(records, held_out, held_out_by, progress)
            tasks = listing.tasks(shard_size)
            missing = folder.begin(listing, tasks)
            begun = True
            job = Job(records, source, out, images, conditions)
            _make(job, folder, tasks, missing, workers, lock, progress)
            if not folder.finished:
                folder.finish(tasks)
            written = _written(folder, len(missing))
            if not any(written.samples.values()):
                folder.undo()
                raise InputError(f"{str(source)!r} gave no sample: {written}; mend the source")
            folder.clear_notes()
            return written
    except OSError as error:
        there = str(error.filename or out)
        message = f"{there!r} cannot be read or written ({error.strerror or error}); mend that first"
        raise InputError(f"{message}; {GOES_ON}" if begun else message) from error


def _make(
    job: Job, folder: Out, tasks: list[Task], missing: list[Task], workers: int | None, lock: FolderLock, progress: bool
) -> None:
    """Makes the missing shards under a bar."""
    num_records, num_missing = (sum(len(task.records) for task in some) for some in (tasks, missing))
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), len(missing), num_missing // _WORTH_A_WORKER)
        workers = 0 if workers == 1 else workers
    totals = {"skipped": 0, "filtered": 0}
    with tqdm(
        total=num_records, initial=num_records - num_missing, unit=" images", disable=None if progress else True
    ) as bar:

        def watch(news: Progress) -> None:
            totals["skipped"] += news.skipped
            totals["filtered"] += news.filtered
            bar.set_postfix(totals if job.filter else {"skipped": totals["skipped"]}, refresh=False)
            bar.update(news.done)

        try:
            make_shards(job, missing, workers, lock, watch)
        except InputError as error:
            raise InputError(f"{error}; {GOES_ON}") from None
        finally:
            folder.clear_partial()


def _written(folder: Out, num_made: int) -> Written:
    plan: dict[str, Any] = folder.plan
    of_split = {split: [n for name, n in plan["samples"].items() if name.startswith(f"{split}-")] for split in SPLITS}
    return Written(
        samples={split: sum(counts) for split, counts in of_split.items()},
        shards={split: sum(map(bool, counts)) for split, counts in of_split.items()},
        skipped=plan["skipped"],
        filtered=plan["filtered"],
        unread=plan.get("unread", {}),
        num_made=num_made,
    )


def _leading(counts: dict[str, int]) -> dict[str, int]:
    """The largest first."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
