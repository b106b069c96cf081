"""A record to the members of a sample: captions made clean, the image checked, reduced and encoded as asked."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from typing import Any

from PIL import Image

from imagen_lightning.data.decode import FILE_FORMATS, decode_image
from imagen_lightning.data.filters import Filter
from imagen_lightning.data.ingest.record import Fault, Record
from imagen_lightning.data.skips import Reason, Unusable
from imagen_lightning.errors import InputError
from imagen_lightning.io.lines import lines

FORMATS = ("keep", "jpg", "png", "webp")

_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_NAMES = {suffix: name for name, suffix in _SUFFIXES.items()}


class Filtered(Exception):
    """A record does not meet a condition, `reason` as it was written."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class ImageSettings:
    """How images are stored.

    Attributes:
        max_side: longest side in pixels; larger images are reduced to it by the area filter. None reduces none.
        short_side: shorter side in pixels, likewise.
        format: "keep" stores JPEG, PNG and WebP files that are not reduced as they are, reduced ones in their format,
            and others as PNG; "jpg", "png" or "webp" stores files that have another format in this one.
        quality: of JPEG and WebP images that are encoded anew, 1 to 100.
    """

    max_side: int | None = None
    short_side: int | None = None
    format: str = "keep"
    quality: int = 95

    def __post_init__(self) -> None:
        for name, side in (("max side", self.max_side), ("short side", self.short_side)):
            if side is not None and side < 1:
                raise InputError(f"{name} {side} must be at least 1")
        if self.max_side is not None and self.short_side is not None:
            raise InputError(f"max side {self.max_side} and short side {self.short_side}: give one of them")
        if self.format not in FORMATS:
            raise InputError(f"format {self.format!r} is none of {', '.join(FORMATS)}")
        if not 1 <= self.quality <= 100:
            raise InputError(f"quality {self.quality} must be from 1 to 100")

    def scale(self, size: tuple[int, int]) -> float:
        """The factor, at most 1, by which an image of this size is reduced."""
        if self.max_side is not None:
            return min(1.0, self.max_side / max(size))
        return 1.0 if self.short_side is None else min(1.0, self.short_side / min(size))


def make_sample(record: Record, settings: ImageSettings, filter_: Filter | None = None) -> dict[str, bytes]:
    """The members of a sample: its image, txt and json.

    The json holds the table's other columns, the first caption, all of them where there are several, the image's name
    as `source`, and its size; where it was reduced also the size before, as `original_width` and `original_height`
    unless the table has such columns.

    Raises:
        Fault: the record cannot be used.
        Filtered: it does not meet the filter, which sees the image's size before it is reduced.
    """
    if record.fault is not None:
        raise Fault(record.fault)
    captions = _captions(record.captions)
    if record.image is None:
        raise Fault(Reason.NO_IMAGE)
    try:
        image = decode_image(record.image, FILE_FORMATS)
    except Unusable as unusable:
        raise Fault(unusable.reason) from None
    size = image.size
    metadata = {
        **{name: _plain(value) for name, value in record.metadata.items() if not isinstance(value, bytes)},
        "caption": captions[0],
        "source": record.name,
        "width": image.width,
        "height": image.height,
    }
    if len(captions) > 1:
        metadata["captions"] = captions
    why_not = None if filter_ is None else filter_.why_not(metadata)
    if why_not is not None:
        raise Filtered(why_not)
    suffix, data, stored_size = _stored(record.image, image, settings)
    if stored_size != size:
        before = {"original_width": size[0], "original_height": size[1]}
        metadata = {**before, **metadata, "width": stored_size[0], "height": stored_size[1]}
    return {
        suffix: data,
        "txt": "\n".join(captions).encode(),
        "json": json.dumps(metadata, ensure_ascii=False, default=str).encode("utf-8", "replace"),
    }


def _stored(data: bytes, image: Image.Image, settings: ImageSettings) -> tuple[str, bytes, tuple[int, int]]:
    """Suffix and bytes of the image to store, and its size."""
    with Image.open(io.BytesIO(data), formats=FILE_FORMATS) as header:
        found = str(header.format)
    wanted = _NAMES.get(settings.format) or (found if found in _SUFFIXES else "PNG")
    scale = settings.scale(image.size)
    if scale == 1.0 and wanted == found:
        return _SUFFIXES[found], data, image.size
    if scale < 1.0:
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BOX)
    image.info = {}  # a profile or a transparent colour that holds no more
    buffer = io.BytesIO()
    image.save(buffer, wanted, **({} if wanted == "PNG" else {"quality": settings.quality}))
    return _SUFFIXES[wanted], buffer.getvalue(), image.size


def _captions(found: bytes | list[str | bytes] | None) -> list[str]:
    """The lines of a sidecar, or a table's captions, without needless spaces."""
    try:
        if isinstance(found, bytes):
            captions = lines(found.decode("utf-8-sig"))
        else:
            captions = [text.decode() if isinstance(text, bytes) else text for text in found or []]
        captions = [" ".join(caption.split()) for caption in captions]
        for caption in captions:
            caption.encode()
    except UnicodeError:
        raise Fault(Reason.CAPTION_NOT_UTF8) from None
    captions = [caption for caption in captions if caption]
    if not captions:
        raise Fault(Reason.NO_CAPTION)
    return captions


def _plain(value: Any) -> Any:
    """A value as JSON has it: no bytes, and None for a number that is not finite."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items() if not isinstance(item, bytes)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value if not isinstance(item, bytes)]
    return None if isinstance(value, float) and not math.isfinite(value) else value
