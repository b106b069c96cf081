"""Image files with a txt of the same name beside each, in a folder or a zip."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator

from imagen_lightning.data.ingest.containers import Container, leads_out
from imagen_lightning.data.ingest.record import (
    IMAGE_SUFFIXES,
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    Entry,
    Fault,
    Record,
    Several,
    Source,
)
from imagen_lightning.data.skips import Reason
from imagen_lightning.errors import InputError


class ImageFiles(Source):
    """Every image file of a container; its txt holds captions, one a line.

    As a field to split by, `folder` is the folder that an image lies in, and `caption` the whole of its txt.
    """

    def __init__(self, container: Container) -> None:
        self.container = container

    def entries(self, group_by: str | None = None) -> Iterator[Entry]:
        if group_by not in (None, "folder", "caption"):
            raise InputError(
                f"{str(self.container.path)!r} holds images with captions alone, which have no field {group_by!r}: "
                "split by 'folder' or 'caption'"
            )
        files = list(self.container.files())
        texts = {name: stamp for name, stamp, fault in files if fault is None and name.endswith(".txt")}
        for name, stamp, fault in files:
            if is_image(name):
                sidecar = _sidecar(name)
                group = posixpath.dirname(name) if group_by == "folder" else None
                if group_by == "caption" and sidecar in texts:
                    group = self._caption_text(name)
                yield Entry((name, fault), name, group, f"{stamp} {texts.get(sidecar, '')}")

    def read(self, place: tuple[str, str | None]) -> Record:
        name, fault = place
        if fault is not None:
            return Record(name, name, fault=fault)
        try:
            return Record(name, name, self.container.read(name, MAX_IMAGE_BYTES), self._caption(name))
        except Fault as found:
            return Record(name, name, fault=found.reason)

    def close(self) -> None:
        self.container.close()

    def _caption(self, name: str) -> bytes | None:
        try:
            return self.container.read(_sidecar(name), MAX_CAPTION_BYTES)
        except Fault as fault:
            if fault.reason == Reason.NO_IMAGE.value:  # no such file
                return None
            raise

    def _caption_text(self, name: str) -> str | None:
        try:
            return (self._caption(name) or b"").decode("utf-8", "replace").strip() or None
        except Fault:  # it is left out when it is read
            return None


class ImageFolder(Several):
    """Tables called metadata beside the images that they name, as Hugging Face's ImageFolder has them; images that no
    table names follow, with a txt as caption."""

    def __init__(self, tables: list[Source], files: ImageFiles) -> None:
        super().__init__([*tables, files])

    def entries(self, group_by: str | None = None) -> Iterator[Entry]:
        named = set()
        rest = len(self.parts) - 1
        for number, part in enumerate(self.parts[:rest]):
            for entry in part.entries(group_by):
                if not leads_out(entry.name):
                    named.add(posixpath.normpath(entry.name))
                yield entry._replace(place=(number, entry.place))
        for entry in self.parts[rest].entries():
            if entry.name not in named:
                yield entry._replace(place=(rest, entry.place))


def is_image(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _sidecar(name: str) -> str:
    return posixpath.splitext(name)[0] + ".txt"
