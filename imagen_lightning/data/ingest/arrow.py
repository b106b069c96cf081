"""Parquet files, and Arrow files as Hugging Face's datasets are saved to disk; read by the number of a row."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

from imagen_lightning.data.ingest.record import Entry, Record
from imagen_lightning.data.ingest.tables import Columns, Table, Where
from imagen_lightning.errors import InputError

_ROWS_READ_AHEAD = 64
_ROWS_LISTED = 8192
_NOWHERE: tuple[int, int, Any, Any] = (-1, 0, None, None)  # row group, number of the batch's first row, batch, batches


class ArrowTable(Table):
    """Rows in Arrow's record batches."""

    def __init__(self, where: Where, columns: Columns) -> None:
        self._opened: Any = None
        super().__init__(where, columns)

    def column_names(self) -> list[str]:
        return list(self.schema().names)

    def schema(self) -> Any:
        raise NotImplementedError

    def guess_image(self) -> str | None:
        """The one column of bytes and path."""
        import pyarrow

        found = [
            column.name
            for column in self.schema()
            if pyarrow.types.is_struct(column.type) and {child.name for child in column.type} == {"bytes", "path"}
        ]
        return found[0] if len(found) == 1 else None

    def listed_columns(self, group_by: str | None) -> list[str]:
        """What of the table a listing needs: the image's path and the field, without any image's bytes."""
        import pyarrow

        self.check_group(group_by)
        types, kind = pyarrow.types, self.schema().field(self.image).type
        wanted = []
        if types.is_struct(kind):
            wanted += [f"{self.image}.path"] if "path" in {child.name for child in kind} else []
        elif not (types.is_binary(kind) or types.is_large_binary(kind)):
            wanted += [self.image]
        return [*wanted, *([group_by] if group_by in self.names else [])]

    def close(self) -> None:
        super().close()
        self._opened = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


class Parquet(ArrowTable):
    """A parquet file. A row is reached through those before it in its row group."""

    def __init__(self, where: Where, columns: Columns) -> None:
        self._ends: list[int] = []
        self._group, self._start, self._batch, self._batches = _NOWHERE
        super().__init__(where, columns)

    def schema(self) -> Any:
        return self._file().schema_arrow

    def entries(self, group_by: str | None = None) -> Iterator[Entry]:
        wanted = self.listed_columns(group_by)
        number = 0
        if not wanted:
            for number in range(self._file().metadata.num_rows):
                yield self.entry(number, number, {}, group_by)
            return
        pyarrow = import_pyarrow()
        try:
            for batch in self._file().iter_batches(_ROWS_LISTED, columns=wanted, use_threads=False):
                for row in range(batch.num_rows):
                    yield self.entry(number, number, row_of(batch, row), group_by)
                    number += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise self._damaged(number, error) from None

    def stamp(self) -> str:
        """The hash of the footer, which says where everything lies, and the smallest and largest values."""
        with self.where.container.open(self.where.name) as file:
            end = file.seek(-8, 2)
            length = min(int.from_bytes(file.read(4), "little"), end)
            file.seek(end - length)
            return hashlib.sha256(file.read(length)).hexdigest()

    def read(self, place: int) -> Record:
        pyarrow = import_pyarrow()
        group = bisect_right(self._groups(), place)
        try:
            if group != self._group or place < self._start:
                self._batches = self._file().iter_batches(_ROWS_READ_AHEAD, row_groups=[group], use_threads=False)
                self._group, self._batch = group, None
                self._start = self._ends[group - 1] if group else 0
            while self._batch is None or place >= self._start + self._batch.num_rows:
                self._start += 0 if self._batch is None else self._batch.num_rows
                self._batch = next(self._batches)
        except (pyarrow.ArrowException, OSError, StopIteration) as error:
            raise self._damaged(place, error) from None
        return self.record(place, row_of(self._batch, place - self._start))

    def _groups(self) -> list[int]:
        """The number of the first row after each row group."""
        if not self._ends:
            metadata = self._file().metadata
            self._ends = list(accumulate(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)))
        return self._ends

    def _file(self) -> Any:
        if self._opened is None:
            pyarrow = import_pyarrow()
            from pyarrow import parquet

            container, name = self.where.container, self.where.name
            try:
                self._opened = parquet.ParquetFile(container.local(name) or container.open(name), pre_buffer=False)
            except (pyarrow.ArrowException, OSError) as error:
                raise InputError(f"{self.where} is no parquet file: {error}") from None
        return self._opened

    def _damaged(self, row: int, error: Exception) -> InputError:
        return InputError(f"{self.where} is damaged near row {row + 1}: {' '.join(str(error).split())}")

    def close(self) -> None:
        super().close()
        self._group, self._start, self._batch, self._batches = _NOWHERE

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **dict(zip(("_group", "_start", "_batch", "_batches"), _NOWHERE))}


class ArrowFile(ArrowTable):
    """An Arrow file in the stream or the file format, mapped into memory."""

    def __init__(self, where: Where, columns: Columns) -> None:
        self._ends: list[int] = []
        super().__init__(where, columns)

    def schema(self) -> Any:
        self._batches()
        return self._schema

    def entries(self, group_by: str | None = None) -> Iterator[Entry]:
        wanted = self.listed_columns(group_by)
        number = 0
        for batch in self._batches():
            columns = {name: batch.column(name) for name in wanted if name in self.names}
            if f"{self.image}.path" in wanted:
                columns[self.image] = batch.column(self.image).field("path")
            for row in range(batch.num_rows):
                values = {name: _value(column, row) for name, column in columns.items()}
                yield self.entry(number, number, values, group_by)
                number += 1

    def stamp(self) -> str:
        return str(self._path().stat().st_size)

    def read(self, place: int) -> Record:
        batches = self._batches()
        number = bisect_right(self._ends, place)
        return self.record(place, row_of(batches[number], place - (self._ends[number - 1] if number else 0)))

    def _path(self) -> Path:
        return self.where.container.path / self.where.name

    def _batches(self) -> list[Any]:
        if self._opened is None:
            pyarrow = import_pyarrow()
            try:
                mapped = pyarrow.memory_map(str(self._path()))
                try:
                    table = pyarrow.ipc.open_stream(mapped).read_all()
                except pyarrow.ArrowInvalid:
                    table = pyarrow.ipc.open_file(mapped).read_all()
            except (pyarrow.ArrowException, OSError) as error:
                raise InputError(f"{self.where} is no Arrow file: {error}") from None
            self._schema, self._opened = table.schema, table.to_batches()
            self._ends = list(accumulate(batch.num_rows for batch in self._opened))
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_schema": None}


def row_of(batch: Any, row: int) -> dict[str, Any]:
    """A row of a record batch as a mapping."""
    return {name: _value(column, row) for name, column in zip(batch.schema.names, batch.columns)}


def _value(column: Any, row: int) -> Any:
    """A cell; text that is not UTF-8 comes as bytes, and with it what it is part of as None."""
    import pyarrow

    try:
        return column[row].as_py()
    except UnicodeDecodeError:
        types = pyarrow.types
        if types.is_string(column.type) or types.is_large_string(column.type):
            return column.slice(row, 1).cast(pyarrow.large_binary())[0].as_py()
        return None


def import_pyarrow() -> ModuleType:
    """Raises InputError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise InputError("reading parquet and Arrow needs pyarrow: pip install 'imagen-lightning[parquet]'") from None
    return pyarrow
