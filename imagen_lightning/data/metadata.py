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

import math
from collections.abc import Iterable, Mapping
from typing import Any

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

_SIZES = ("width", "height", "original_width", "original_height")
_UNKNOWN = ("", "?", "none", "null", "nan")


def find_columns(names: Iterable[str]) -> dict[str, str]:
    """The name under which a source has each known field that it has; each name serves one field.

    An alias spelled as here goes before one in other letters: where there are both `width` and `WIDTH`, the first is
    the width.
    """
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
    if not isinstance(value, str | int | float):
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
