"""Where files lie: a folder or a zip, behind one face."""

from __future__ import annotations

import errno
import io
import os
import posixpath
import stat
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from heapq import heappop, heappush
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from imagen_lightning.data.ingest.record import IMAGE_SUFFIXES, MAX_IMAGE_BYTES, READ_SUFFIXES, TOO_MANY_BYTES, Fault
from imagen_lightning.data.skips import Reason
from imagen_lightning.errors import InputError

MAX_TABLE_BYTES = 2**30  # of a table within a zip, which is held in memory
OTHER_COMPRESSION = "zip member neither stored nor deflated"

# What is wrong with one file, not with the disk.
_OF_THE_FILE = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ENXIO),
}


class Container(ABC):
    """Files by their name, with `/` between folders."""

    @property
    @abstractmethod
    def path(self) -> Path:
        """The folder or archive."""

    @abstractmethod
    def files(self) -> Iterator[tuple[str, str, str | None]]:
        """Name and stamp of every file, and why it must not be read, in an order that stays."""

    @abstractmethod
    def read(self, name: str, limit: int) -> bytes:
        """A file's bytes.

        Raises:
            Fault: there is none, it is longer than `limit`, damaged, or has a name that leads elsewhere.
        """

    def read_image(self, name: str) -> bytes:
        """Return an image file's bytes.

        Raises:
            Fault: as `read`, or of a format that is not read.
        """
        if posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES - READ_SUFFIXES:
            raise Fault(Reason.OTHER_FORMAT)
        return self.read(name, MAX_IMAGE_BYTES)

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """A table, to be read at any offset."""

    def local(self, name: str) -> Path | None:
        """The file itself, None where it is within another."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Closes what it has open; it opens again when read."""


def leads_out(name: str) -> bool:
    """Whether a name is absolute or has `..` in it."""
    return name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/")


def is_resource_fork(name: str) -> bool:
    """Whether a file is one that macOS lays beside each of a zip's or a foreign disk's."""
    path = PurePosixPath(name)
    return path.name.startswith("._") or "__MACOSX" in path.parts


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


class Folder(Container):
    """A folder and those below it. Links to folders are followed once, but not to one that holds this folder.

    Args:
        path: the folder.
        inside: refuse names that lead out of it.
    """

    def __init__(self, path: Path, inside: bool = True) -> None:
        self._path = path
        self.inside = inside

    @property
    def path(self) -> Path:
        return self._path

    def files(self) -> Iterator[tuple[str, str, str | None]]:
        for name in sorted(self._names()):
            try:
                status = (self._path / name).stat()
            except OSError as error:  # noqa: PERF203
                if error.errno not in _OF_THE_FILE:
                    raise
                yield name, "", Reason.NO_IMAGE.value  # a link to nothing
            else:
                regular = stat.S_ISREG(status.st_mode)
                yield name, str(status.st_size) if regular else "", None if regular else Reason.UNSAFE_MEMBER.value

    def _names(self) -> Iterator[str]:
        """All but folders, of which each is entered once: by its own name, else by the first link to it."""
        above = {_identity(folder) for folder in self._path.resolve().parents}
        seen: set[tuple[int, int]] = set()
        folders, links = [""], list[str]()
        while folders or links:
            folder = folders.pop() if folders else heappop(links)
            identity = _identity(self._path / folder)
            if identity in above:
                yield folder
            if identity in seen | above:
                continue
            seen.add(identity)
            with os.scandir(self._path / folder) as entries:
                for entry in entries:
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    if not entry.is_symlink():
                        if entry.is_dir():
                            folders.append(name)
                        else:
                            yield name
                    elif os.path.isdir(entry.path):
                        heappush(links, name)
                    else:
                        yield name

    def read(self, name: str, limit: int) -> bytes:
        if self.inside and leads_out(name):
            raise Fault(Reason.UNSAFE_MEMBER)
        path = self._path / name
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise Fault(Reason.NO_IMAGE)
            if status.st_size > limit:
                raise Fault(TOO_MANY_BYTES)
            return path.read_bytes()
        except ValueError:  # a name that no file can have
            raise Fault(Reason.NO_IMAGE) from None
        except OSError as error:
            if error.errno not in _OF_THE_FILE:
                raise
            raise Fault(Reason.NO_IMAGE) from None

    def open(self, name: str) -> BinaryIO:
        return (self._path / name).open("rb")

    def local(self, name: str) -> Path:
        return self._path / name

    def close(self) -> None:
        """Nothing stays open."""


class Zip(Container):
    """A zip file; of two members of one name the first counts. Nothing is extracted to the disk.

    Raises:
        InputError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._zip: zipfile.ZipFile | None = None
        self._members: dict[str, zipfile.ZipInfo] = {}
        self._archive()

    @property
    def path(self) -> Path:
        return self._path

    def files(self) -> Iterator[tuple[str, str, str | None]]:
        self._archive()
        for info in self._archive().infolist():
            if info.is_dir():
                continue
            fault = None
            if leads_out(info.filename):
                fault = Reason.UNSAFE_MEMBER.value
            elif self._members[info.filename] is not info:
                fault = Reason.DUPLICATE_KEY.value
            yield info.filename, f"{info.file_size} {info.CRC}", fault

    def read(self, name: str, limit: int) -> bytes:
        archive = self._archive()
        if leads_out(name):
            raise Fault(Reason.UNSAFE_MEMBER)
        info = self._members.get(name)
        if info is None:
            raise Fault(Reason.NO_IMAGE)
        if info.file_size > limit:
            raise Fault(TOO_MANY_BYTES)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Fault(OTHER_COMPRESSION)  # zipfile bounds what it inflates of deflated members alone
        try:
            with archive.open(info) as file:
                data = file.read(info.file_size)  # a size given: the member may inflate to more than it says
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError):
            raise Fault(Reason.UNDECODABLE) from None
        if len(data) < info.file_size:
            raise Fault(Reason.TRUNCATED_IMAGE)
        return data

    def open(self, name: str) -> BinaryIO:
        try:
            return io.BytesIO(self.read(name, MAX_TABLE_BYTES))
        except Fault as fault:
            raise InputError(f"{name!r} in {str(self._path)!r} cannot be read: {fault.reason}") from None

    def close(self) -> None:
        if self._zip is not None:
            self._zip.close()
            self._zip = None

    def _archive(self) -> zipfile.ZipFile:
        if self._zip is None:
            try:
                self._zip = zipfile.ZipFile(self._path)
            except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
                raise InputError(f"{str(self._path)!r} is no zip file: {error}") from None
            self._members = {}
            for info in self._zip.infolist():
                self._members.setdefault(info.filename, info)
        return self._zip

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_zip": None, "_members": {}}
