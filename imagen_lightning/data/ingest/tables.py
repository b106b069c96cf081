"""Tables of captioned images: CSV, TSV and JSON lines, read by the offset of a row."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from imagen_lightning.data.ingest.containers import Container
from imagen_lightning.data.ingest.record import Entry, Fault, Record, Source, group_text
from imagen_lightning.data.skips import Reason
from imagen_lightning.errors import InputError
from imagen_lightning.io.lines import cell_reader

IMAGE_COLUMNS = ("image", "file_name", "filename", "image_path", "path", "file")
CAPTION_COLUMNS = ("caption", "text", "captions", "prompt")
ADDRESS_COLUMNS = ("url", "image_url", "img_url")

_LIMIT_CSV_FIELD = 2**27


@dataclass(frozen=True)
class Columns:
    """The columns asked for.

    Attributes:
        image: None takes the first of the usual ones that there is.
        captions: likewise where empty; of several each gives captions.
        usual_image: the usual names of the image's column, in the order of preference.
    """

    image: str | None = None
    captions: tuple[str, ...] = ()
    usual_image: tuple[str, ...] = IMAGE_COLUMNS


@dataclass(frozen=True)
class Where:
    """Where a table lies, and how its rows are named.

    Attributes:
        container: holds the table and the images that it names.
        name: the table's name in it.
        folder: the folder in it that the images' names start from; "" or one that ends in "/".
        label: put before a row's number, to tell the tables of one source apart.
        extra: fields that each row has beside the table's own.
    """

    container: Container
    name: str
    folder: str = ""
    label: str = ""
    extra: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return repr(str(self.container.path / self.name))


class Table(Source):
    """Rows with an image and captions: bytes, a path, or a mapping of both as Hugging Face writes, and strings or
    lists of strings."""

    image: str
    captions: tuple[str, ...]

    def __init__(self, where: Where, columns: Columns) -> None:
        self.where = where
        self.names = self.column_names()
        twice = [name for name, count in Counter(self.names).items() if count > 1 and name]
        if twice:
            raise InputError(f"{where} has several columns {twice[0]!r}; give each a name of its own")
        self.image = _image_column(columns, self.names, self.guess_image(), where)
        wanted = columns.captions or (_first(CAPTION_COLUMNS, self.names),)
        for name in wanted:
            if name is None or name not in self.names:
                tried = CAPTION_COLUMNS if name is None else (name,)
                raise InputError(_no_column("caption", tried, self.names, where))
        self.captions = tuple(name for name in wanted if name is not None)

    @abstractmethod
    def column_names(self) -> list[str]:
        """The table's columns."""

    def guess_image(self) -> str | None:
        """The column that must hold the images, whatever its name, if the table's types tell."""
        return None

    def check_group(self, group_by: str | None) -> None:
        """Raises InputError where there is no such field."""
        if group_by is not None and group_by not in self.names and group_by not in dict(self.where.extra):
            raise InputError(_no_field(group_by, self.names, self.where))

    def entry(self, place: Any, number: int, row: Mapping[str, Any], group_by: str | None, stamp: str = "") -> Entry:
        """The entry of row `number`, from a row that has at least the image's name and the field."""
        found = row.get(self.image)
        name = self._name(number, found)
        if isinstance(found, str) and found.startswith(("http://", "https://")):
            raise InputError(f"column {self.image!r} of {self.where} holds addresses such as {found!r}; {_DOWNLOAD}")
        group = None if group_by is None else group_text({**row, **dict(self.where.extra)}.get(group_by))
        return Entry(place, name, group, stamp)

    def record(self, number: int, row: Mapping[str, Any]) -> Record:
        """Row `number` as a record."""
        found = row.get(self.image)
        name = self._name(number, found)
        row_name = self._row(number)
        record = Record(name, row_name if name == row_name else f"{row_name}: {name}")
        record.captions = [text for column in self.captions for text in _texts(row.get(column))]
        used = (self.image, *self.captions)
        rest = {key: value for key, value in row.items() if isinstance(key, str) and key not in used}
        record.metadata = {**rest, **dict(self.where.extra)}
        data = found.get("bytes") if isinstance(found, Mapping) else found
        if isinstance(data, bytes):
            record.image = data
        elif name == row_name:
            record.fault = Reason.NO_IMAGE.value
        else:
            try:
                record.image = self.where.container.read_image(name)
            except Fault as fault:
                record.fault = fault.reason
        return record

    def faulty(self, number: int, reason: Reason) -> Record:
        """A row that cannot be read."""
        return Record(self._row(number), self._row(number), fault=reason.value)

    def _name(self, number: int, found: Any) -> str:
        path = found.get("path") if isinstance(found, Mapping) else found
        if not isinstance(path, str) or not path:
            return self._row(number)
        return posixpath.join(self.where.folder, path) if self.where.folder else path

    def _row(self, number: int) -> str:
        return f"{self.where.label}row {number + 1}"

    def close(self) -> None:
        self.where.container.close()


class TextTable(Table):
    """A table whose rows are found by their offset; a place is (number, offset)."""

    def __init__(self, where: Where, columns: Columns) -> None:
        self._file: BinaryIO | None = None
        super().__init__(where, columns)

    def file(self, offset: int) -> BinaryIO:
        """The table at an offset."""
        if self._file is None:
            self._file = self.where.container.open(self.where.name)
        self._file.seek(offset)
        return self._file

    def close(self) -> None:
        super().close()
        if self._file is not None:
            self._file.close()
            self._file = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


class Delimited(TextTable):
    """CSV, or TSV by its suffix; the first line names the columns. Bytes that are not UTF-8 are kept as such.

    A quotation mark in a TSV is a character like others: published ones quote nothing.
    """

    def column_names(self) -> list[str]:
        header = next((row for _, row in self._rows() if row), None)
        if header is None or next(self._data(), None) is None:
            raise InputError(f"{self.where} has no rows; its first line must name the columns")
        return header

    def entries(self, group_by: str | None = None) -> Iterator[Entry]:
        self.check_group(group_by)
        for number, (offset, cells) in enumerate(self._data()):
            yield self.entry((number, offset), number, self._row_of(cells), group_by, "\0".join(cells))

    def read(self, place: tuple[int, int]) -> Record:
        number, offset = place
        text = _text(self.file(offset))
        try:
            cells = next(self._reader(text), [])
        finally:
            text.detach()
        record = self.record(number, self._row_of(cells))
        if any(cells[len(self.names) :]):
            record.fault = Reason.BAD_ROW.value
        return record

    def _row_of(self, cells: list[str]) -> dict[str, str]:
        return dict(zip(self.names, cells))

    def _data(self) -> Iterator[tuple[int, list[str]]]:
        """Offset and cells of every row that is not empty, below the header."""
        rows = ((offset, cells) for offset, cells in self._rows() if cells)
        next(rows, None)
        return rows

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        with self.where.container.open(self.where.name) as file:
            lines = _Lines(_text(file))
            offset = number = 0  # of the row; 0 is the one of the names
            try:
                for cells in self._reader(lines):
                    yield offset, cells
                    offset = lines.num_bytes
                    number += bool(cells)
            except csv.Error as error:
                raise InputError(
                    f"{self.where} cannot be read from row {number} (byte {offset}) on: {error}; close the quotation "
                    "mark that opens a cell there, and double those within it"
                ) from None

    def _reader(self, lines: Iterable[str]) -> Iterator[list[str]]:
        csv.field_size_limit(_LIMIT_CSV_FIELD)
        return cell_reader(lines, self.where.name.lower().endswith(".tsv"))


class _Lines:
    """Lines of a text, and how many bytes those given so far took."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self.num_bytes = 0

    def __iter__(self) -> Iterator[str]:
        for line in self._text:
            start = line.removeprefix("\ufeff") if self.num_bytes == 0 else line
            self.num_bytes += len(line.encode("utf-8", "surrogateescape"))
            yield start


def _text(file: BinaryIO) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")


class JsonLines(TextTable):
    """A JSON object a line; the first names the columns. Empty lines are no rows."""

    def column_names(self) -> list[str]:
        first = next((row for _, line in self._lines() if (row := _parse(line)) is not None), None)
        if first is None:
            raise InputError(f"{self.where} has no line that is a JSON object")
        return list(first)

    def entries(self, group_by: str | None = None) -> Iterator[Entry]:
        self.check_group(group_by)
        for number, (offset, line) in enumerate(self._lines()):
            stamp = line.decode("utf-8", "surrogateescape")
            yield self.entry((number, offset), number, _parse(line) or {}, group_by, stamp)

    def read(self, place: tuple[int, int]) -> Record:
        number, offset = place
        row = _parse(self.file(offset).readline())
        return self.faulty(number, Reason.BAD_JSON) if row is None else self.record(number, row)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        offset = 0
        with self.where.container.open(self.where.name) as file:
            for line in file:
                if line.strip():
                    yield offset, line
                offset += len(line)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object that a line holds, None where it holds none."""
    try:
        row = json.loads(line.decode("utf-8", "surrogateescape").removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _texts(found: Any) -> list[str | bytes]:
    """The strings of a cell that holds one or a list."""
    return [text for text in (found if isinstance(found, list) else [found]) if isinstance(text, str | bytes)]


# ---- columns

_DOWNLOAD = "download the images first, for example with img2dataset, whose shards train as they are"


def _first(usual: Iterable[str], names: Iterable[str]) -> str | None:
    """The first usual name that there is, as it is written there."""
    there = {name.lower(): name for name in reversed(list(names))}
    return next((there[name] for name in usual if name in there), None)


def _image_column(columns: Columns, names: list[str], guess: str | None, where: Where) -> str:
    if columns.image is not None:
        if columns.image not in names:
            raise InputError(_no_column("image", (columns.image,), names, where))
        return columns.image
    found = _first(columns.usual_image, names) or guess
    if found is None:
        address = _first(ADDRESS_COLUMNS, names)
        if address is not None:
            raise InputError(f"{where} has addresses ({address!r}) and no images; {_DOWNLOAD}")
        raise InputError(_no_column("image", columns.usual_image, names, where))
    return found


def _no_column(kind: str, tried: Iterable[str], names: Iterable[str], where: Where) -> str:
    return (
        f"{where} has no {kind} column {' or '.join(map(repr, tried))}; its columns are "
        f"{', '.join(map(repr, names))}: give --{kind}-column"
    )


def _no_field(field: str, names: Iterable[str], where: Where) -> str:
    return f"{where} has no field {field!r} to split by; its columns are {', '.join(map(repr, names))}"
