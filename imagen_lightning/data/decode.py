"""Bytes of a sample's members to pixels, captions and text states; what cannot be used raises `Unusable`."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from imagen_lightning.data.skips import Reason, Unusable
from imagen_lightning.images import from_pil
from imagen_lightning.types import Text

SHARD_FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 2**26  # 67 million; 256 MiB once decoded to RGBA
MAX_TEXT_BYTES = 2**28

# What Pillow raises on damaged files, by its own decoders' tests and by flipping bits.
_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    AssertionError,
    struct.error,
    zlib.error,
)


def decode_image(data: bytes, formats: tuple[str, ...] = SHARD_FORMATS) -> Image.Image:
    """Decodes the first frame to 8-bit RGB: upright by its EXIF tag, transparency on white, 16 bits scaled.

    Raises:
        Unusable: not an image of these formats, truncated, or of more than MAX_PIXELS (seen before decoding).
    """
    with warnings.catch_warnings():  # of large images and damaged tags, which are dealt with here
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=formats)
            if image.width * image.height > MAX_PIXELS:
                raise Unusable(Reason.TOO_MANY_PIXELS)
            image.load()
        except Image.DecompressionBombError:
            raise Unusable(Reason.TOO_MANY_PIXELS) from None
        except _PILLOW_ERRORS as error:
            raise Unusable(Reason.TRUNCATED_IMAGE if "truncated" in str(error) else Reason.UNDECODABLE) from None
        try:
            upright = ImageOps.exif_transpose(image)
        except _PILLOW_ERRORS:  # a damaged tag says nothing of how the image lies
            upright = image
        try:
            return _to_rgb(upright)
        except _PILLOW_ERRORS:
            raise Unusable(Reason.UNDECODABLE) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey
        grey = np.asarray(image, dtype=np.int64).clip(0, 65535)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, size: int, place: float = 0.5, allow_upscale: bool = False) -> Tensor:
    """Resizes the shorter side to `size` and crops the longer one, to (3, size, size) uint8.

    Downward by the area filter (each pixel the mean of those it covers), upward by bicubic.

    Args:
        image: RGB.
        size: side of the result in pixels.
        place: where along the longer side, in [0, 1]; 0.5 is the centre.
        allow_upscale: enlarge images whose shorter side is below `size`.

    Raises:
        Unusable: the image is smaller than `size` and may not be enlarged.
    """
    short = min(image.size)
    if short < size and not allow_upscale:
        raise Unusable(Reason.TOO_SMALL)
    left, top = (round(place * (side - short)) for side in image.size)
    box = (left, top, left + short, top + short)
    if short == size:
        return from_pil(image.crop(box))
    filter_ = Image.Resampling.BOX if short > size else Image.Resampling.BICUBIC
    return from_pil(image.resize((size, size), filter_, box=box))


def decode_captions(text: bytes | None, metadata: bytes | None, field: str | None = None) -> list[str]:
    """A sample's captions: each line of its txt, or the string or list of strings under a field of its json.

    Args:
        text: the txt member, or None.
        metadata: the json member, or None.
        field: the json field to take; None takes the txt, and json's "caption" where there is no txt.

    Raises:
        Unusable: no caption that is more than spaces, not UTF-8, or not JSON.
    """
    try:
        if field is None and text is not None:
            captions = text.decode("utf-8-sig").splitlines()
        else:
            record = json.loads((metadata or b"{}").decode("utf-8-sig"))
            found = record.get(field or "caption") if isinstance(record, dict) else None
            captions = [item for item in (found if isinstance(found, list) else [found]) if isinstance(item, str)]
    except UnicodeDecodeError:
        raise Unusable(Reason.CAPTION_NOT_UTF8) from None
    except (ValueError, RecursionError):
        raise Unusable(Reason.BAD_JSON) from None
    captions = [stripped for caption in captions if (stripped := " ".join(caption.split()))]
    if not captions:
        raise Unusable(Reason.NO_CAPTION)
    return captions


def decode_text_states(data: bytes, encoder: str | None = None) -> tuple[Text, str]:
    """Stored text states: an npz with `states` (L, D) float16 or float32 and `encoder` (a string, the encoder's name),
    and, where the encoder has them, `mask` (L,) bool and `pooled` (D,); for the sample's first caption.

    Args:
        data: the text.npz member.
        encoder: the name that the states must bear; None takes any.

    Returns:
        A Text of one caption in float32, its mask given, and the encoder's name. `pooled` defaults to the masked mean.

    Raises:
        Unusable: damaged, of other shapes, not finite, or of another encoder.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(item.file_size for item in archive.infolist()) > MAX_TEXT_BYTES:
                raise Unusable(Reason.BAD_TEXT_STATES)
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            states, name = arrays["states"], str(arrays["encoder"])
            mask = arrays["mask"] if "mask" in arrays else np.ones(len(states), dtype=bool)
            pooled = arrays.get("pooled")
    except (*_PILLOW_ERRORS, zipfile.BadZipFile, MemoryError):
        raise Unusable(Reason.BAD_TEXT_STATES) from None
    if encoder is not None and name != encoder:
        raise Unusable(Reason.OTHER_ENCODER)
    floats = (np.float16, np.float32)
    if states.ndim != 2 or states.dtype not in floats or mask.shape != states.shape[:1] or mask.dtype != bool:
        raise Unusable(Reason.BAD_TEXT_STATES)
    if not mask.any() or (pooled is not None and (pooled.shape != states.shape[1:] or pooled.dtype not in floats)):
        raise Unusable(Reason.BAD_TEXT_STATES)
    states = states.astype(np.float32)
    pooled = states[mask].mean(0) if pooled is None else pooled.astype(np.float32)
    if not (np.isfinite(states).all() and np.isfinite(pooled).all()):
        raise Unusable(Reason.NAN_TEXT_STATES)
    return Text(*(torch.from_numpy(array)[None] for array in (states, mask, pooled))), name


def stack_text(texts: Sequence[Text]) -> Text:
    """Texts of one caption each to one batch, padded to the longest."""
    length = max(text.states.shape[1] for text in texts)
    states = torch.zeros(len(texts), length, texts[0].states.shape[2])
    mask = torch.zeros(len(texts), length, dtype=torch.bool)
    for number, text in enumerate(texts):
        states[number, : text.states.shape[1]] = text.states[0]
        if text.mask is not None:
            mask[number, : text.states.shape[1]] = text.mask[0]
    return Text(states, mask, torch.cat([text.pooled for text in texts]))
