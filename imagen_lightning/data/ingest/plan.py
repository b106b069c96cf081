"""The folder that shards are written to: its plan, its lock, and what is known of each finished shard.

`plan.json` lies there from the start and says which records make which shard. Each shard that is whole has a note
`unfinished/SHARD.json`, written before the shard gets its name: a shard is finished if it has both, or a note that
tells of no sample. The last step gathers the notes in `skipped.jsonl` and in the plan.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from imagen_lightning.data.ingest.record import Source
from imagen_lightning.errors import InputError
from imagen_lightning.io.atomic import whole_file

PLAN = "plan.json"
SKIPPED = "skipped.jsonl"
SPLITS = ("train", "heldout")

_NOTES = "unfinished"
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Task:
    """One shard to make.

    Attributes:
        split: "train" or "heldout".
        number: of the shard in its split.
        records: number and place of each of its records.
    """

    split: str
    number: int
    records: list[tuple[int, Any]]

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"


@dataclass
class Note:
    """What became of a shard's records.

    Attributes:
        samples: number of those that were stored.
        skipped: key and reason of those that could not be used.
        filtered: key and condition of those that the filter removed.
    """

    samples: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    filtered: list[tuple[str, str]] = field(default_factory=list)


# ---- listing


@dataclass
class Listing:
    """The records of a source.

    Attributes:
        records: number and place of each, by split.
        digest: SHA-256 of all names, groups and stamps.
        unread: number of other files, by kind.
    """

    records: dict[str, list[tuple[int, Any]]]
    digest: str
    unread: dict[str, int]

    @property
    def num_records(self) -> int:
        return sum(map(len, self.records.values()))

    def tasks(self, shard_size: int) -> list[Task]:
        """The shards: each takes the next `shard_size` records of its split."""
        return [
            Task(split, number, records[start : start + shard_size])
            for split, records in self.records.items()
            for number, start in enumerate(range(0, len(records), shard_size))
        ]


def list_records(source: Source, held_out: float, group_by: str | None, progress: bool = False) -> Listing:
    """Lists a source and parts its records by a hash of their name, or of their group where they have one.

    Args:
        source: the records.
        held_out: share in [0, 1) of names, or groups, that are held out.
        group_by: the field that groups them; None is by name.
        progress: show a bar where the error output is a terminal.
    """
    records: dict[str, list[tuple[int, Any]]] = {split: [] for split in SPLITS}
    digest = hashlib.sha256()
    entries = tqdm(
        source.entries(group_by), "listing", unit=" records", leave=False, disable=None if progress else True
    )
    for number, entry in enumerate(entries):
        split = "heldout" if _share(entry.group or entry.name) < held_out else "train"
        records[split].append((number, entry.place))
        for text in (entry.name, entry.group or "", entry.stamp):
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "big") + data)
    digest.update(source.stamp().encode())
    source.close()
    return Listing(records, digest.hexdigest(), source.unread())


def _share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:6], "big") / 2**48


# ---- the folder


class Out:
    """A folder of shards and its plan.

    Args:
        folder: it exists, and is locked.
        request: what was asked for: `source`, and `options` by their names.

    Raises:
        InputError: it holds shards without a plan, or a plan of another request.
    """

    def __init__(self, folder: Path, request: Mapping[str, Any]) -> None:
        self.folder = folder
        self.request = {"format_version": _FORMAT_VERSION, **request}
        self.plan: dict[str, Any] = {}
        if (folder / PLAN).exists():
            self.plan = self._read_plan()
            self._compare()
        elif any(folder.glob("*.tar")):
            raise InputError(f"{str(folder)!r} holds shards already, without a plan; give another folder")
        elif (folder / SKIPPED).exists():
            raise InputError(f"{str(folder)!r} holds a {SKIPPED} already; give another folder")

    @property
    def finished(self) -> bool:
        return bool(self.plan.get("finished"))

    def begin(self, listing: Listing, tasks: list[Task]) -> list[Task]:
        """Writes the plan where there is none, clears what a stopped run left, and returns the shards still to make.

        Raises:
            InputError: the source has changed since the plan was made.
        """
        found = {"num_records": listing.num_records, "listing_sha256": listing.digest}
        if not self.plan:
            shards = {split: sum(task.split == split for task in tasks) for split in SPLITS}
            self.plan = {**self.request, **found, "unread": listing.unread, "shards": shards, "finished": False}
            self._write_plan()
        elif any(self.plan.get(key) != value for key, value in found.items()):
            raise InputError(
                f"the source {self.request['source']!r} has changed since {str(self.folder)!r} was begun "
                f"({self.plan.get('num_records')} records then, {listing.num_records} now, names, sizes or text "
                "differ); give another folder, or delete this one"
            )
        self.clear_partial()
        if self.finished:
            self.clear_notes()
        missing = [task for task in tasks if not self._is_made(task)]
        if missing:
            (self.folder / _NOTES).mkdir(exist_ok=True)
        return missing

    def clear_partial(self) -> None:
        """Removes what a stopped run was writing."""
        names = (*(f"{split}-" for split in SPLITS), PLAN, SKIPPED)
        for path in [*self.folder.glob("*.partial"), *(self.folder / _NOTES).glob("*.partial")]:
            if path.name.lstrip(".").startswith(names):
                path.unlink()

    def finish(self, tasks: Iterable[Task]) -> None:
        """Gathers the notes of all shards in the plan and in skipped.jsonl."""
        totals: dict[str, Any] = {"samples": {}, "skipped": {}, "filtered": {}}
        with _synced(self.folder / SKIPPED) as file:
            for task in tasks:
                note = read_note(self.folder, task.name)
                totals["samples"][task.name] = note.samples
                for kind, pairs in (("skipped", note.skipped), ("filtered", note.filtered)):
                    for key, reason in pairs:
                        totals[kind][reason] = totals[kind].get(reason, 0) + 1
                        said = reason if kind == "skipped" else f"filter: {reason}"
                        file.write(json.dumps({"shard": self.plan["source"], "key": key, "reason": said}) + "\n")
        if not (totals["skipped"] or totals["filtered"]):
            (self.folder / SKIPPED).unlink()
        self.plan |= {"finished": True, **totals}
        self._write_plan()
        self.clear_notes()

    def clear_notes(self) -> None:
        """Removes the notes, which the plan has made needless."""
        if (self.folder / _NOTES).exists():
            shutil.rmtree(self.folder / _NOTES)

    def undo(self) -> None:
        """Removes a plan that gave no shard, and what belongs to it."""
        self.clear_notes()
        for name in (SKIPPED, PLAN):
            (self.folder / name).unlink(missing_ok=True)

    def _is_made(self, task: Task) -> bool:
        tar = self.folder / f"{task.name}.tar"
        if self.finished:
            return tar.exists() or not self.plan["samples"].get(task.name)
        path = _note_path(self.folder, task.name)
        return path.exists() and (tar.exists() or read_note(self.folder, task.name).samples == 0)

    def _read_plan(self) -> dict[str, Any]:
        path = self.folder / PLAN
        try:
            plan = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            plan = None
        if not isinstance(plan, dict) or "options" not in plan:
            raise InputError(f"{str(path)!r} is no plan of shards; give another folder")
        return plan

    def _compare(self) -> None:
        def differs(what: str, then: Any, now: Any) -> InputError:
            return InputError(
                f"{str(self.folder)!r} was begun with {what} {then!r}, not {now!r}; give that again, or another folder"
            )

        if self.plan.get("format_version") != _FORMAT_VERSION:
            raise differs("a plan of format", self.plan.get("format_version"), _FORMAT_VERSION)
        if self.plan.get("source") != self.request["source"]:
            raise differs("the source", self.plan.get("source"), self.request["source"])
        for name, value in self.request["options"].items():
            if self.plan["options"].get(name) != value:
                raise differs(f"--{name}", self.plan["options"].get(name), value)

    def _write_plan(self) -> None:
        with _synced(self.folder / PLAN) as file:
            file.write(json.dumps(self.plan, indent=2) + "\n")


# ---- notes


def write_note(folder: Path, shard: str, note: Note) -> None:
    with _synced(_note_path(folder, shard)) as file:
        file.write(json.dumps(asdict(note)))


def read_note(folder: Path, shard: str) -> Note:
    return Note(**json.loads(_note_path(folder, shard).read_text(encoding="utf-8")))


def _note_path(folder: Path, shard: str) -> Path:
    return folder / _NOTES / f"{shard}.json"


@contextmanager
def _synced(path: Path) -> Iterator[TextIO]:
    """A file to write that is on the disk before it has its name."""
    with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
