"""What is known of samples beside image and caption: size, similarity, safety, language, …, under one name each.

Releases name one thing in many ways; `ALIASES` gives each field its names, compared without regard to case. Columns as
the releases have them:

- LAION-400M (img2dataset's dataset_examples/laion400m.md; tensorflow_datasets' laion400m): SAMPLE_ID, URL, TEXT,
  HEIGHT, WIDTH, LICENSE ("?" where unknown), NSFW (a word), similarity; LAION-2B-multi adds LANGUAGE.
- LAION-2B joined, aesthetic, high-resolution, art (dataset_examples/laion5B.md, laion-aesthetic.md): URL, TEXT, WIDTH,
  HEIGHT, similarity, hash, punsafe, pwatermark, aesthetic, LANGUAGE; LAION-Aesthetics V2 as CSV: AESTHETIC_SCORE.
- Re-LAION-2B (-research, -research-safe): url, caption, width, height, status, similarity and the joined scores, in
  lower case.
- COYO-700M (its data card): width, height, clip_similarity_vitb32, clip_similarity_vitl14, nsfw_score_opennsfw2,
  nsfw_score_gantman, watermark_score, aesthetic_score_laion_v2.
- DataComp (its pools' viewer): original_width, original_height, clip_b32_similarity_score, clip_l14_similarity_score;
  filtered ones add detected_language. PD12M: width, height, license.
- img2dataset's output (its README and writer.py): key, status ("success", "failed_to_download", "failed_to_resize"),
  error_message, width, height, original_width, original_height, exif, sha256, and the columns asked for by
  `--save_additional_columns`; the same in each sample's json and, failed rows too, in a parquet beside the tar.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from imagen_lightning.data.index import cached_index
from imagen_lightning.errors import InputError
from imagen_lightning.io.atomic import write_bytes

log = logging.getLogger(__name__)

ALIASES: dict[str, tuple[str, ...]] = {
    "width": ("width", "image_width"),
    "height": ("height", "image_height"),
    # Where a release's WIDTH came through img2dataset beside its own width, it is that of the image on the web.
    "original_width": ("original_width", "width"),
    "original_height": ("original_height", "height"),
    # Of two CLIPs the ViT-B/32, whose similarity LAION gives.
    "similarity": (
        "similarity",
        "clip_similarity",
        "clip_similarity_vitb32",
        "clip_b32_similarity_score",
        "clip_similarity_vitl14",
        "clip_l14_similarity_score",
    ),
    "punsafe": (
        "punsafe",
        "p_unsafe",
        "prob_unsafe",
        "nsfw",
        "nsfw_score",
        "nsfw_score_opennsfw2",
        "nsfw_score_gantman",
    ),
    "pwatermark": ("pwatermark", "p_watermark", "watermark_score", "watermark"),
    "aesthetic": ("aesthetic", "aesthetic_score", "aesthetic_score_laion_v2", "aesthetics", "aesthetics_score"),
    "language": ("language", "lang", "detected_language"),
    "licence": ("licence", "license", "license_name", "licensename", "license_url", "licenseurl"),
    "status": ("status",),
}
"""The names of each field, the preferred ones first."""

WORDS = ("language", "licence", "status")
NUMBERS = tuple(field for field in ALIASES if field not in WORDS)

NSFW_WORDS = {"UNLIKELY": 0.0, "UNSURE": 0.5, "NSFW": 1.0}
"""LAION-400M's tags as probabilities: a limit below 0.5 keeps UNLIKELY alone, one below 1 UNSURE too. Any other word,
such as UNTAGGED, says nothing."""

_FORMAT = "1"  # of the files that keep columns
_SIZES = ("width", "height", "original_width", "original_height")
_UNKNOWN = ("", "?", "none", "null", "nan")


def find_columns(names: Iterable[str]) -> dict[str, str]:
    """The name under which a source has each known field that it has; each name serves one field.

    An alias spelled as here goes before one in other letters: where there are both `width` and `WIDTH`, the first is
    the width.
    """
    return dict(_find_columns(tuple(names)))


@lru_cache(maxsize=64)
def _find_columns(names: tuple[str, ...]) -> dict[str, str]:
    free = list(dict.fromkeys(names))
    found: dict[str, str] = {}
    for field, aliases in ALIASES.items():
        for alias in aliases:
            same = [name for name in free if name.casefold() == alias]
            if same:
                found[field] = alias if alias in same else same[0]
                free.remove(found[field])
                break
    return found


def known_fields(record: Mapping[str, Any]) -> dict[str, float | str]:
    """The known fields of one sample's metadata: numbers as float, words as they are; what is missing is left out."""
    fields: dict[str, float | str] = {}
    for field, name in find_columns(name for name in record if isinstance(name, str)).items():
        if field in WORDS:
            if word := as_word(record[name]):
                fields[field] = word
        elif not math.isnan(number := as_number(field, record[name])):
            fields[field] = number
    return fields


def as_number(field: str, value: object) -> float:
    """A value of a field as a number, NaN where it is none: text that is no number, infinities, sizes of 0 and less."""
    if isinstance(value, str) and field == "punsafe" and value.strip().upper() in NSFW_WORDS:
        return NSFW_WORDS[value.strip().upper()]
    if not isinstance(value, str | Real):
        return math.nan
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) and (number > 0 or field not in _SIZES) else math.nan


def as_word(value: object) -> str:
    """A value as a word without the spaces around it, "" where it says nothing, as LAION's "?" does."""
    word = value.strip() if isinstance(value, str) else ""
    return "" if word.casefold() in _UNKNOWN else word


# ---- columns of a shard


def read_columns(
    path: Path, keys: Sequence[str], read_json: Callable[[int], bytes | None], files: Sequence[Path] = ()
) -> dict[str, np.ndarray]:
    """The known fields of a shard's samples: numbers in float64 with NaN, words as text with "", where one lacks it.

    They come from the parquet that img2dataset writes beside the shard, joined by key, or, where there is none, from
    the samples' json members; a json that cannot be read says nothing. They are kept in a file (see `column_files`),
    and read from there as long as the shard, the parquet and the keys are the same.

    Args:
        path: the shard, or where it would lie beside its parquet.
        keys: the names of its samples.
        read_json: number of a sample to the bytes of its json, None where it has none.
        files: where they may be kept, the best place first.

    Returns:
        Field to (len(keys),) array, for the fields that at least one sample has.

    Raises:
        InputError: the parquet is damaged, or pyarrow is not installed.
    """
    parquet = path.with_suffix(".parquet")
    stamp = {
        "format": _FORMAT,
        "shard": _stamp(path),
        "parquet": _stamp(parquet),
        "keys": hashlib.sha256("\n".join(keys).encode("utf-8", "surrogatepass")).hexdigest(),
    }
    columns = next((found for file in files if (found := _load(file, stamp)) is not None), None)
    if columns is None:
        columns = _from_parquet(parquet, keys) if parquet.exists() else None
        if columns is None:
            columns = _from_json(len(keys), read_json)
        if files:
            _save(files, stamp, columns)
    return columns


def column_files(path: Path, cache: Path) -> list[Path]:
    """Where a shard's columns may be kept, the best place first: beside it, and in a cache folder."""
    return [
        path.with_name(f"{path.name}.metadata"),
        cached_index(os.path.abspath(path), cache).with_suffix(".metadata"),
    ]


def _stamp(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def _from_parquet(path: Path, keys: Sequence[str]) -> dict[str, np.ndarray] | None:
    """The columns of a table that has a column of keys and some of these keys, else None."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            f"reading {str(path)!r} needs pyarrow: pip install 'imagen-lightning[parquet]'; or move it away, and the "
            "samples' json is read"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if name.casefold() != "key"]
            key = next((name for name in file.schema_arrow.names if name.casefold() == "key"), None)
            found = find_columns(names)
            table = file.read(columns=[*found.values(), *([] if key is None else [key])])
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{str(path)!r} is no parquet file ({error}); mend it, or move it away, and the samples' json is read"
        ) from None
    rows = {} if key is None else _rows_by_key(table, key, found.get("status"), keys)
    if keys and not rows:
        log.warning("%s names none of the samples of the shard beside it; the samples' json is read", path)
        return None
    there = np.array([row is not None for row in map(rows.get, keys)], dtype=bool)
    taken = np.array([rows[key] for key in keys if key in rows], dtype=np.int64)
    columns = {}
    for field, name in found.items():
        column = blank(field, len(keys))
        column[there] = _values(field, table.column(name))[taken]
        columns[field] = column
    return _present(columns)


def _rows_by_key(table: Any, column: str, status: str | None, keys: Sequence[str]) -> dict[str, int]:
    """The row of each key that has one: the first that was not a failure."""
    wanted: dict[object, str] = {key: key for key in keys}
    wanted.update({int(key): key for key in keys if len(key) < 19 and key.isascii() and key.isdigit()})  # as numbers
    values = table.column(column).to_pylist()
    states = [None] * len(values) if status is None else table.column(status).to_pylist()
    rows: dict[str, int] = {}
    for row, (value, state) in enumerate(zip(values, states)):
        if as_word(state).casefold() in ("", "success") and isinstance(value, str | int) and value in wanted:
            rows.setdefault(wanted[value], row)
    return rows


def _values(field: str, column: Any) -> np.ndarray:
    """An arrow column as float64, or as objects of text."""
    import pyarrow

    if field in WORDS:
        return np.array([as_word(value) for value in column.to_pylist()], dtype=object)
    if not (pyarrow.types.is_integer(column.type) or pyarrow.types.is_floating(column.type)):
        return np.array([as_number(field, value) for value in column.to_pylist()], dtype=float)
    numbers = column.cast(pyarrow.float64(), safe=False).to_numpy().copy()
    numbers[~np.isfinite(numbers) | ((numbers <= 0) & (field in _SIZES))] = math.nan
    return numbers


def _from_json(num_samples: int, read_json: Callable[[int], bytes | None]) -> dict[str, np.ndarray]:
    columns = {field: blank(field, num_samples) for field in ALIASES}
    for number in range(num_samples):
        for field, value in known_fields(parse_json(read_json(number))).items():
            columns[field][number] = value
    return _present(columns)


def parse_json(data: bytes | None) -> dict[str, Any]:
    """A json member's object, {} where there is none: absent, damaged, or of another kind."""
    try:
        record = json.loads((data or b"{}").decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def blank(field: str, num_samples: int) -> np.ndarray:
    """A column of a field that every sample lacks."""
    return np.full(num_samples, "", dtype=object) if field in WORDS else np.full(num_samples, math.nan)


def lacks(column: np.ndarray) -> np.ndarray:
    """(n,) bool: which samples lack a column's field."""
    return np.isnan(column) if column.dtype.kind == "f" else column == ""


def _present(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns that say something, words as text."""
    plain = {field: column.astype(str) if field in WORDS else column for field, column in columns.items()}
    return {field: column for field, column in plain.items() if not lacks(column).all()}


def _save(files: Sequence[Path], stamp: Mapping[str, str], columns: Mapping[str, np.ndarray]) -> None:
    """Writes columns to the first file that can be written: words as numbers into the list of those that occur."""
    from safetensors.numpy import save

    arrays, words = {}, {}
    for field, column in columns.items():
        if field in WORDS:
            kinds, arrays[field] = np.unique(column, return_inverse=True)
            words[field] = kinds.tolist()
        else:
            arrays[field] = column
    data = save(arrays, {**stamp, "words": json.dumps(words)})
    for file in files:
        try:
            if not file.parent.exists() or file.parent.stat().st_mode & 0o222:  # else left alone, by root too
                write_bytes(file, data)
                return
        except OSError as error:  # noqa: PERF203
            log.info("%s cannot be written: %s", file, error.strerror)
    log.warning("the metadata of %s can be kept nowhere and is read anew each time", files[0].stem)


def _load(path: Path, stamp: Mapping[str, str]) -> dict[str, np.ndarray] | None:
    """The columns kept in a file, None where there is none or it is of other files."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            if {name: metadata.get(name) for name in stamp} != dict(stamp):
                return None
            words = json.loads(metadata["words"])
            columns = {field: file.get_tensor(field) for field in file.keys()}  # noqa: SIM118
        return {
            field: np.array(words[field])[column] if field in words else column for field, column in columns.items()
        }
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError, LookupError) as error:
        log.warning("%s is damaged (%s) and made anew", path, error)
        return None
