"""What kind of source a path is."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Sequence
from pathlib import Path

from imagen_lightning.data.ingest.arrow import ArrowFile, Parquet
from imagen_lightning.data.ingest.containers import Container, Folder, Zip, is_resource_fork
from imagen_lightning.data.ingest.files import ImageFiles, ImageFolder, count_kinds, is_image
from imagen_lightning.data.ingest.record import READ_SUFFIXES, Several, Source
from imagen_lightning.data.ingest.tables import IMAGE_COLUMNS, Columns, Delimited, JsonLines, Table, Where
from imagen_lightning.data.skips import counted_by_kind
from imagen_lightning.errors import InputError

TABLES: dict[str, type[Table]] = {
    ".csv": Delimited,
    ".tsv": Delimited,
    ".jsonl": JsonLines,
    ".parquet": Parquet,
    ".arrow": ArrowFile,
}
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_SPLITS, _STATE, _INFO = "dataset_dict.json", "state.json", "dataset_info.json"


def open_source(path: Path, image_column: str | None = None, caption_columns: Sequence[str] = ()) -> Source:
    """The captioned images of a folder or file.

    - a .csv, .tsv, .jsonl, .parquet or .arrow file: images are paths relative to it, or, in the last two, bytes;
    - a folder that Hugging Face's `save_to_disk` wrote, of one split or of several, which follow one another, each
      row with its `split`;
    - a folder or .zip with metadata.csv, .jsonl or .parquet beside images, in it or in folders of it;
    - any other folder or .zip with images, a .txt of the same name beside each;
    - a folder with parquet files and no images.

    Raises:
        InputError: no such file, an unknown kind, damaged, nothing in it, or missing columns.
    """
    columns = Columns(image_column, tuple(caption_columns))
    if not path.exists():
        raise InputError(f"source {str(path)!r} does not exist")
    if path.is_dir():
        if (path / _SPLITS).is_file():
            return _splits(path, columns)
        if (path / _STATE).is_file() or ((path / _INFO).is_file() and any(path.glob("*.arrow"))):
            return Several(_saved(path, columns))
        return _images(Folder(path), columns)
    suffix = path.suffix.lower()
    if suffix == ".zip":
        return _images(Zip(path), columns)
    if suffix not in TABLES:
        raise InputError(f"source {str(path)!r} is neither a folder nor a {', '.join([*TABLES, '.zip'])} file")
    return TABLES[suffix](Where(Folder(path.parent, inside=False), path.name), columns)


def _images(container: Container, columns: Columns) -> Source:
    files = [(name, fault) for name, _, fault in container.files()]
    names = [name for name, fault in files if fault is None and not is_resource_fork(name)]
    preferred = Columns(columns.image, columns.captions, ("file_name", *IMAGE_COLUMNS))
    tables: dict[str, Source] = {}
    for name in names:
        if posixpath.basename(name) in _METADATA:
            folder, suffix = posixpath.join(posixpath.dirname(name), ""), posixpath.splitext(name)[1]
            tables[name] = TABLES[suffix](Where(container, name, folder, f"{name} "), preferred)
    if tables:
        return ImageFolder(list(tables.values()), ImageFiles(container, tables))
    if any(is_image(name) for name, _ in files):
        return ImageFiles(container)
    parquet = [name for name in names if name.endswith(".parquet")]
    others = count_kinds(name for name, _ in files if name not in set(parquet))
    if not parquet:
        raise InputError(
            f"{str(container.path)!r} holds no image ({', '.join(sorted(READ_SUFFIXES))}) and no table"
            + (f"; it holds {counted_by_kind(others)}" if others else "")
        )
    return Several([Parquet(Where(container, name, label=f"{name} "), columns) for name in parquet], others)


def _splits(path: Path, columns: Columns) -> Source:
    """The splits of a saved DatasetDict."""
    names = _json(path / _SPLITS).get("splits")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{str(path / _SPLITS)!r} names no splits; give the folder of one of them")
    parts: list[Source] = []
    for name in names:
        if not (path / name).is_dir():
            raise InputError(f"{str(path)!r} lacks the split {name!r} that its {_SPLITS} names")
        parts += _saved(path / name, columns, name)
    return Several(parts)


def _saved(path: Path, columns: Columns, split: str | None = None) -> list[Source]:
    """The Arrow files of a saved dataset, those that its state names, in order."""
    state = _json(path / _STATE) if (path / _STATE).is_file() else {}
    if state.get("_indices_data_files"):
        raise InputError(f"{str(path)!r} was saved with indices; load it, `flatten_indices()`, and save it again")
    files = state.get("_data_files")
    names = [str(file.get("filename")) for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    if not all(posixpath.basename(name) == name for name in names):
        raise InputError(f"{str(path / _STATE)!r} names files that do not lie beside it")
    names = names or sorted(file.name for file in path.glob("*.arrow"))
    if not names:
        raise InputError(f"{str(path)!r} holds no .arrow file; save the dataset with `save_to_disk`")
    extra = () if split is None else (("split", split),)
    start = "" if split is None else f"{split}/"
    container = Folder(path, inside=False)
    return [ArrowFile(Where(container, name, label=f"{start}{name} ", extra=extra), columns) for name in names]


def _json(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise InputError(f"{str(path)!r} is not JSON: {error}") from None
    return found if isinstance(found, dict) else {}
