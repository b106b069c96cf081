"""Folders and tables of captioned images to shards."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from imagen_lightning.data.decode import decode_image
from imagen_lightning.data.shards import ShardWriter
from imagen_lightning.data.skips import Reason, Skip, SkipLog, Unusable
from imagen_lightning.types import InputError

IMAGE_COLUMNS = ("image", "file_name", "filename", "image_path", "path", "file")
CAPTION_COLUMNS = ("caption", "text", "captions", "prompt")

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_LIMIT_CSV_FIELD = 2**27


@dataclass
class Record:
    """One captioned image of a source.

    Attributes:
        name: its name in the source.
        image: its file, or its bytes.
        caption: a sidecar's bytes, or a table's string or strings.
        metadata: the table's other columns.
        fault: why it could not be read at all.
    """

    name: str
    image: Path | bytes | None
    caption: bytes | str | list[str] | None
    metadata: dict[str, Any] = field(default_factory=dict)
    fault: Reason | None = None


def write_shards(
    source: Path,
    out: Path,
    *,
    shard_size: int = 1000,
    max_side: int | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    held_out: float = 0.0,
    quality: int = 95,
    progress: bool = True,
) -> tuple[dict[str, int], SkipLog]:
    """Writes a folder or table of captioned images as `train-NNNNN.tar` and `heldout-NNNNN.tar`.

    JPEG, PNG and WebP files are stored as they are, other formats as PNG. What cannot be used is counted and listed in
    `out/skipped.jsonl`. Each sample's json holds the caption, the image's name and size, and the table's other columns.

    Args:
        source: a folder of images with a txt of the same name beside each, or a .csv, .tsv, .jsonl or .parquet file
            with image and caption columns; images are paths relative to the file (in parquet, bytes too).
        out: the folder to write, made if need be; it must hold no shards.
        shard_size: samples of a shard.
        max_side: longest side in pixels; larger images are reduced by the area filter and encoded anew.
        image_column: default: the first of IMAGE_COLUMNS that there is.
        caption_column: default: the first of CAPTION_COLUMNS that there is; strings, or lists of strings.
        held_out: share in [0, 1) of samples that go to held-out shards, chosen by a hash of the image's name.
        quality: of JPEG and WebP files that are encoded anew, 1 to 100.
        progress: show a bar where the error output is a terminal.

    Returns:
        Number of samples by split, and the skips.

    Raises:
        InputError: an unreadable source, missing columns, nothing usable, shards in `out`, a folder that cannot be
            written, or a value out of range; no shard is left.
    """
    if shard_size < 1 or (max_side is not None and max_side < 1):
        raise InputError(f"shard size {shard_size}, max side {max_side}: both must be at least 1")
    if not 0 <= held_out < 1:
        raise InputError(f"held-out share {held_out} must be at least 0 and below 1")
    if not 1 <= quality <= 100:
        raise InputError(f"quality {quality} must be from 1 to 100")
    if out.exists() and not out.is_dir():
        raise InputError(f"{str(out)!r} is a file; give a folder")
    if out.exists() and any(out.glob("*.tar")):
        raise InputError(f"{str(out)!r} holds shards already; give another folder, or delete them")
    made = not out.exists()
    listing = out / "skipped.jsonl"
    new = not listing.exists()
    skips = SkipLog(max_share=1.0)
    try:
        total, records = read_source(source, image_column, caption_column)
        out.mkdir(parents=True, exist_ok=True)
        for leftover in out.glob("*.tar.partial"):
            leftover.unlink()
        skips.list_in(listing)
        with ExitStack() as stack:
            writers = {name: stack.enter_context(ShardWriter(out, name, shard_size)) for name in ("train", "heldout")}
            bar = stack.enter_context(tqdm(records, total=total, unit=" images", disable=None if progress else True))
            for number, record in enumerate(bar):
                try:
                    members = _members(record, max_side, quality)
                except Unusable as fault:  # noqa: PERF203
                    key = record.name if source.is_dir() else f"row {number + 1}: {record.name}"
                    skips.note([Skip(str(source), key, fault.reason)])
                    bar.set_postfix(skipped=skips.counts.total())
                else:
                    split = "heldout" if _share(record.name) < held_out else "train"
                    writers[split].write(f"{number:09d}", members)
        counts = {name: writer.num_samples for name, writer in writers.items()}
        if not any(counts.values()):
            raise InputError(f"{str(source)!r} gave no shard: {skips.summary()}; mend the source")
    except (InputError, OSError) as error:  # shards of a part of the source would pass for all of it
        for path in [*out.glob("*.tar"), *([listing] if new and listing.exists() else [])]:
            path.unlink()
        if isinstance(error, InputError):
            raise
        there = str(error.filename or out)
        raise InputError(f"{there!r} cannot be read or written ({error.strerror or error}); mend that first") from error
    finally:
        if made and out.is_dir() and not any(out.iterdir()):
            out.rmdir()
    return counts, skips


def _members(record: Record, max_side: int | None, quality: int) -> dict[str, bytes]:
    if record.fault is not None:
        raise Unusable(record.fault)
    captions = _captions(record.caption)
    if record.image is None:
        raise Unusable(Reason.NO_IMAGE)
    try:
        data = record.image if isinstance(record.image, bytes) else record.image.read_bytes()
    except (OSError, ValueError):
        raise Unusable(Reason.NO_IMAGE) from None
    image = decode_image(data, _FORMATS)
    format_ = _format(data)
    if max_side is not None and max(image.size) > max_side:
        scale = max_side / max(image.size)
        size = tuple(max(1, round(side * scale)) for side in image.size)
        image = image.resize((size[0], size[1]), Image.Resampling.BOX)
        format_ = format_ if format_ in _KEPT else "PNG"
        data = _encode(image, format_, quality)
    elif format_ not in _KEPT:
        format_ = "PNG"
        data = _encode(image, format_, quality)
    metadata = {
        **record.metadata,
        "caption": captions[0],
        "source": record.name,
        "width": image.width,
        "height": image.height,
    }
    if len(captions) > 1:
        metadata["captions"] = captions
    return {
        _KEPT[format_]: data,
        "txt": "\n".join(captions).encode(),
        "json": json.dumps(metadata, ensure_ascii=False, default=str).encode("utf-8", "replace"),
    }


def _format(data: bytes) -> str:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        return str(image.format)


def _encode(image: Image.Image, format_: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **({} if format_ == "PNG" else {"quality": quality}))
    return buffer.getvalue()


def _captions(found: bytes | str | list[str] | None) -> list[str]:
    """A sidecar's lines, or a table's string or list of strings."""
    try:
        if isinstance(found, bytes):
            found = found.decode("utf-8-sig").splitlines()
        lines = [" ".join(line.split()) for line in ([found] if isinstance(found, str) else found or [])]
        for line in lines:
            line.encode()
    except UnicodeError:
        raise Unusable(Reason.CAPTION_NOT_UTF8) from None
    lines = [line for line in lines if line]
    if not lines:
        raise Unusable(Reason.NO_CAPTION)
    return lines


def _share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6], "big") / 2**48


def read_source(
    source: Path, image_column: str | None = None, caption_column: str | None = None
) -> tuple[int, Iterator[Record]]:
    """The number of records of a folder or table, and the records, read as they are asked for; see `write_shards`.

    Raises:
        InputError: no such source, an unknown kind, or missing columns.
    """
    if source.is_dir():
        return _folder(source)
    if not source.exists():
        raise InputError(f"source {str(source)!r} does not exist")
    kinds = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
    if source.suffix.lower() not in kinds:
        raise InputError(f"source {str(source)!r} is neither a folder nor a {', '.join(kinds)} file")
    return kinds[source.suffix.lower()](source, image_column, caption_column)


def _folder(source: Path) -> tuple[int, Iterator[Record]]:
    paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    if not paths:
        raise InputError(f"folder {str(source)!r} holds no image ({', '.join(sorted(_SUFFIXES))})")

    def records() -> Iterator[Record]:
        for path in paths:
            sidecar = path.with_suffix(".txt")
            yield Record(path.relative_to(source).as_posix(), path, sidecar.read_bytes() if sidecar.is_file() else None)

    return len(paths), records()


def _column(kind: str, wanted: str | None, usual: tuple[str, ...], columns: Iterable[str], source: Path) -> str:
    names = list(columns)
    candidates = usual if wanted is None else (wanted,)
    for name in candidates:
        if name in names:
            return name
    raise InputError(
        f"{str(source)!r} has no {kind} column {' or '.join(map(repr, candidates))}; its columns are "
        f"{', '.join(map(repr, names))}: give --{kind}-column"
    )


def _record(source: Path, number: int, row: Mapping[str, Any], image: str, caption: str) -> Record:
    """A table's row; images are bytes, a path relative to the table, or a mapping of both as Hugging Face writes."""
    found, text = row.get(image), row.get(caption)
    data = found.get("bytes") if isinstance(found, Mapping) else found
    path = found.get("path") if isinstance(found, Mapping) else found
    rest = {key: value for key, value in row.items() if isinstance(key, str) and key not in (image, caption)}
    rest = {key: value for key, value in rest.items() if not isinstance(value, bytes)}
    if isinstance(text, list):
        text = [item for item in text if isinstance(item, str)]
    elif not isinstance(text, str | bytes):
        text = None
    if isinstance(data, bytes):
        return Record(path if isinstance(path, str) and path else f"row {number}", data, text, rest)
    if isinstance(path, str) and path:
        if path.startswith(("http://", "https://")):
            raise InputError(
                f"column {image!r} of {str(source)!r} holds addresses such as {path!r}; download them first, for "
                "example with img2dataset, whose shards train as they are"
            )
        return Record(path, source.parent / path, text, rest)
    return Record(f"row {number}", None, text, rest)


def _csv(source: Path, image_column: str | None, caption_column: str | None) -> tuple[int, Iterator[Record]]:
    csv.field_size_limit(_LIMIT_CSV_FIELD)
    delimiter = "\t" if source.suffix.lower() == ".tsv" else ","

    def rows() -> Iterator[dict[str, Any]]:
        with source.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            try:
                yield from csv.DictReader(file, delimiter=delimiter)
            except csv.Error as error:
                raise InputError(f"{str(source)!r} is no table: {error}") from None

    columns = next(rows(), None)
    if columns is None:
        raise InputError(f"{str(source)!r} has no rows; its first line must name the columns")
    names = [name for name in columns if name is not None]
    image = _column("image", image_column, IMAGE_COLUMNS, names, source)
    caption = _column("caption", caption_column, CAPTION_COLUMNS, names, source)
    num_rows = sum(1 for _ in rows())
    return num_rows, (_record(source, number, row, image, caption) for number, row in enumerate(rows()))


def _jsonl(source: Path, image_column: str | None, caption_column: str | None) -> tuple[int, Iterator[Record]]:
    def rows() -> Iterator[tuple[int, bytes]]:
        with source.open("rb") as file:
            for number, line in enumerate(file):
                if line.strip():
                    yield number, line

    def parse(line: bytes) -> dict[str, Any] | None:
        try:
            row = json.loads(line.decode("utf-8-sig", "surrogateescape"))
        except (ValueError, RecursionError):
            return None
        return row if isinstance(row, dict) else None

    columns = next((row for _, line in rows() if (row := parse(line)) is not None), None)
    if columns is None:
        raise InputError(f"{str(source)!r} has no line that is a JSON object")
    image = _column("image", image_column, IMAGE_COLUMNS, columns, source)
    caption = _column("caption", caption_column, CAPTION_COLUMNS, columns, source)

    def records() -> Iterator[Record]:
        for number, line in rows():
            row = parse(line)
            if row is None:
                yield Record(f"line {number + 1}", None, None, fault=Reason.BAD_JSON)
            else:
                yield _record(source, number, row, image, caption)

    return sum(1 for _ in rows()), records()


def _parquet(source: Path, image_column: str | None, caption_column: str | None) -> tuple[int, Iterator[Record]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError("reading parquet needs pyarrow: pip install 'imagen-lightning[parquet]'") from None
    try:
        table = parquet.ParquetFile(source)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{str(source)!r} is no parquet file: {error}") from None
    names = table.schema_arrow.names
    image = _column("image", image_column, IMAGE_COLUMNS, names, source)
    caption = _column("caption", caption_column, CAPTION_COLUMNS, names, source)

    def records() -> Iterator[Record]:
        number = 0
        try:
            for batch in table.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    yield _record(source, number, row, image, caption)
                    number += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{str(source)!r} is damaged after row {number}: {error}") from None

    return table.metadata.num_rows, records()
