"""Image files with a txt of the same name beside each, in a folder or a zip."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from imagen_lightning.data.ingest.containers import Container, is_resource_fork, leads_out
from imagen_lightning.data.ingest.record import (
    IMAGE_SUFFIXES,
    MAX_CAPTION_BYTES,
    Entry,
    Fault,
    Record,
    Several,
    Source,
)
from imagen_lightning.errors import InputError

Place = tuple[str, str | None, str | None]  # name, fault, name of its txt


class ImageFiles(Source):
    """Every image file of a container; its txt, in capitals or not, holds captions, one a line.

    As a field to split by, `folder` is the folder that an image lies in, and `caption` the whole of its txt.

    Args:
        container: the files.
        tables: names of files that are read otherwise.

    Attributes:
        others: names of the files that are no images and no image's txt, once the source is listed.
    """

    def __init__(self, container: Container, tables: Collection[str] = ()) -> None:
        self.container = container
        self.tables = frozenset(tables)
        self.others: list[str] = []

    def entries(self, group_by: str | None = None) -> Iterator[Entry]:
        if group_by not in (None, "folder", "caption"):
            raise InputError(
                f"{str(self.container.path)!r} holds images with captions alone, which have no field {group_by!r}: "
                "split by 'folder' or 'caption'"
            )
        files = [file for file in self.container.files() if file[0] not in self.tables]
        texts: dict[str, tuple[str, str]] = {}
        for name, stamp, fault in files:
            stem, suffix = posixpath.splitext(name)
            if fault is None and suffix.lower() == ".txt" and (suffix == ".txt" or stem not in texts):
                texts[stem] = name, stamp
        known: set[str | None] = set()
        for name, stamp, fault in files:
            if not is_image(name):
                continue
            text, text_stamp = texts.get(posixpath.splitext(name)[0], (None, ""))
            known.update((name, text))
            group = posixpath.dirname(name) if group_by == "folder" else None
            if group_by == "caption" and text is not None:
                group = self._caption_text(text)
            yield Entry((name, fault, text), name, group, f"{stamp} {text_stamp}")
        self.others = [name for name, _, _ in files if name not in known]

    def unread(self) -> dict[str, int]:
        return count_kinds(self.others)

    def read(self, place: Place) -> Record:
        name, fault, text = place
        if fault is not None:
            return Record(name, name, fault=fault)
        try:
            captions = None if text is None else self.container.read(text, MAX_CAPTION_BYTES)
            return Record(name, name, self.container.read_image(name), captions)
        except Fault as found:
            return Record(name, name, fault=found.reason)

    def close(self) -> None:
        self.container.close()

    def _caption_text(self, text: str) -> str | None:
        try:
            return self.container.read(text, MAX_CAPTION_BYTES).decode("utf-8", "replace").strip() or None
        except Fault:  # it is left out when it is read
            return None


class ImageFolder(Several):
    """Tables called metadata beside the images that they name, as Hugging Face's ImageFolder has them; images that no
    table names follow, with a txt as caption."""

    def __init__(self, tables: list[Source], files: ImageFiles) -> None:
        super().__init__([*tables, files])
        self._files = files
        self._named: set[str] = set()

    def entries(self, group_by: str | None = None) -> Iterator[Entry]:
        rest = len(self.parts) - 1
        for number, part in enumerate(self.parts[:rest]):
            for entry in part.entries(group_by):
                if not leads_out(entry.name):
                    self._named.add(posixpath.normpath(entry.name))
                yield entry._replace(place=(number, entry.place))
        for entry in self._files.entries():
            if entry.name not in self._named:
                yield entry._replace(place=(rest, entry.place))

    def unread(self) -> dict[str, int]:
        return count_kinds(name for name in self._files.others if name not in self._named)


def is_image(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES and not is_resource_fork(name)


def count_kinds(names: Iterable[str]) -> dict[str, int]:
    """Return how many files there are of each kind: their suffix, if they have one."""
    return dict(Counter(map(_kind, names)))


def _kind(name: str) -> str:
    if is_resource_fork(name):
        return "macOS resource fork"
    return posixpath.splitext(name)[1].lower() or "without suffix"
