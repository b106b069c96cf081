"""Bytes of a sample's members to pixels, captions and text states; what cannot be used raises `Unusable`."""

from __future__ import annotations

import io
import json
import lzma
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from imagen_lightning.data.colour import rescale_key, to_srgb
from imagen_lightning.data.skips import Reason, Unusable
from imagen_lightning.images import from_pil
from imagen_lightning.io.lines import lines
from imagen_lightning.types import Text

SHARD_FORMATS = ("JPEG", "PNG", "WEBP")
FILE_FORMATS = (*SHARD_FORMATS, "BMP", "DIB", "GIF", "TIFF", "PPM", "TGA")  # of folders, zips and tables
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

_EXIF = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # where Pillow finds an orientation
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED = (5, 6, 7, 8)  # width and height change places
_REVERSED = (2, 3, 6, 7), (3, 4, 7, 8)  # the upright image's left, or its top, is an end of the stored one


def decode_image(data: bytes, formats: tuple[str, ...] = SHARD_FORMATS) -> Image.Image:
    """Decodes the first frame, whole and exactly, to 8-bit sRGB (see `to_srgb`), upright by its EXIF tag.

    Raises:
        Unusable: not an image of these formats, truncated, or of more than MAX_PIXELS (seen before decoding).
    """
    with _faults():
        image = _open(data, formats)
        image.load()
        return _upright(to_srgb(image), _orientation(image))


def decode_fitted(
    data: bytes,
    size: int | tuple[int, int],
    place: float = 0.5,
    allow_upscale: bool = False,
    exact: bool = False,
    formats: tuple[str, ...] = SHARD_FORMATS,
) -> Tensor:
    """Decodes to what `fit` makes of `decode_image`, and a JPEG that is much larger in less time.

    Unless `exact`, a JPEG is decoded at the smallest of 1/1, 1/2, 1/4 and 1/8 of its size that is still at least twice
    that of the result, by the discrete cosine transform of fewer coefficients, which is close to the area filter (an
    eighth is the mean of each block). From there on the area filter is used where the sizes divide, else Hamming's,
    which has its width without its unevenness at such sizes.

    Args:
        data: an image file.
        size: side of the result, or its height and width, in pixels.
        place: where along the longer side the crop lies, in [0, 1]; 0.5 is the centre.
        allow_upscale: enlarge images that are smaller.
        exact: decode at full size.
        formats: Pillow's names of the formats that may be read.

    Returns:
        (3, height, width) uint8.

    Raises:
        Unusable: as `decode_image`, or smaller than `size` (by the whole image's size) and may not be enlarged.
    """
    with _faults():
        image = _open(data, formats)
        reduction = 1
        # other formats may have their EXIF tag at the end
        if not isinstance(image, JpegImageFile):
            image.load()
        orientation = _orientation(image)
        upright = image.size[::-1] if orientation in _TURNED else image.size
        window = _window(upright, size, place, allow_upscale)
        if isinstance(image, JpegImageFile) and not exact and window.reduction > 1:
            part = image.width // window.reduction, image.height // window.reduction
            reduction = 1 if image.draft(None, part) is None else window.reduction
        image.load()
        image = _upright(to_srgb(image), orientation)
        # the last pixel of a reduced image reaches beyond the whole one: where a turn makes it the first, all shifts
        beyond = [part * reduction - side for part, side in zip(image.size, upright)]
        shift = [over if orientation in turned else 0 for over, turned in zip(beyond, _REVERSED)]
        return _cut(image, window, reduction, (shift[0], shift[1]))


def fit(image: Image.Image, size: int | tuple[int, int], place: float = 0.5, allow_upscale: bool = False) -> Tensor:
    """Resizes to cover `size` and crops what is over, to (3, height, width) uint8.

    Downward by the area filter (each pixel the mean of those it covers), upward by bicubic.

    Args:
        image: RGB.
        size: side of the result, or its height and width, in pixels.
        place: where along the longer side, in [0, 1]; 0.5 is the centre.
        allow_upscale: enlarge images that do not cover `size`.

    Raises:
        Unusable: the image is smaller than `size` and may not be enlarged.
    """
    return _cut(image, _window(image.size, size, place, allow_upscale))


def size_from_header(data: bytes, formats: tuple[str, ...] = SHARD_FORMATS) -> tuple[int, int]:
    """Width and height of an image upright, from its header and EXIF tag, without decoding it; of a file's beginning
    where the header is whole.

    Raises:
        Unusable: not an image of these formats, or of more than MAX_PIXELS.
    """
    with _faults():
        image = _open(data, formats)
        # for the orientation of others Pillow may have to decode them
        turned = isinstance(image, JpegImageFile) and _orientation(image) in _TURNED
        return image.size[::-1] if turned else image.size


class _Window(NamedTuple):
    """What of an image is kept, in its pixels, and the size it is brought to."""

    box: tuple[float, float, float, float]
    width: int
    height: int
    scale: float  # pixels of the image to one of the result, along a side
    reduction: int  # the image at 1/8, 1/4 or 1/2 of its size, the least that leaves 2 pixels to one of the result


def _window(image: tuple[int, int], size: int | tuple[int, int], place: float, allow_upscale: bool) -> _Window:
    height, width = (size, size) if isinstance(size, int) else size
    scale = min(image[0] / width, image[1] / height)
    if scale < 1 and not allow_upscale:
        raise Unusable(Reason.TOO_SMALL)
    # the side that fills the result is kept whole, to the pixel
    kept = [side if side <= scale * new else scale * new for side, new in zip(image, (width, height))]
    reduction = next((number for number in (8, 4, 2) if scale >= 2 * number), 1)
    rooms = [side - keep for side, keep in zip(image, kept)]
    # at whole pixels of the reduced image, a quarter of the result's at most from where it should be
    left, top = (min(round(place * room / reduction), room // reduction) * reduction for room in rooms)
    return _Window((left, top, left + kept[0], top + kept[1]), width, height, scale, reduction)


def _cut(image: Image.Image, window: _Window, reduction: int = 1, shift: tuple[int, int] = (0, 0)) -> Tensor:
    """The window of an image that was decoded at 1 / reduction of its size, with so many pixels more at its left and
    top (of the whole image)."""
    if window.scale == 1:
        whole = image.size == (window.width, window.height)
        return from_pil(image if whole else image.crop(tuple(map(round, window.box))))  # type: ignore[arg-type]
    scale, box = window.scale / reduction, [(side + by) / reduction for side, by in zip(window.box, shift * 2)]
    if scale > 1 and all(number.is_integer() for number in (scale, *box)):
        return from_pil(image.reduce(int(scale), tuple(map(int, box))))  # type: ignore[arg-type]
    if scale < 1:
        filter_ = Image.Resampling.BICUBIC
    else:  # Pillow's area filter takes whole pixels, which is uneven where few of them make one
        filter_ = Image.Resampling.BOX if reduction == 1 else Image.Resampling.HAMMING
    return from_pil(image.resize((window.width, window.height), filter_, box=(box[0], box[1], box[2], box[3])))


@contextmanager
def _faults() -> Iterator[None]:
    """Turns what Pillow raises on damaged files into `Unusable`."""
    with warnings.catch_warnings():  # of large images and damaged tags, which are dealt with here
        warnings.simplefilter("ignore")
        try:
            yield
        except Image.DecompressionBombError:
            raise Unusable(Reason.TOO_MANY_PIXELS) from None
        except _PILLOW_ERRORS as error:
            raise Unusable(Reason.TRUNCATED_IMAGE if "truncated" in str(error) else Reason.UNDECODABLE) from None


def _open(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=formats)
    if image.width * image.height > MAX_PIXELS:
        raise Unusable(Reason.TOO_MANY_PIXELS)
    rescale_key(image)
    return image


def _orientation(image: Image.Image) -> int:
    """How an image lies by its EXIF tag (1 upright, 2 to 8), 1 where there is none; a damaged one says nothing."""
    if not any(name in image.info for name in _EXIF):
        return 1
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except _PILLOW_ERRORS:
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


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
            captions = lines(text.decode("utf-8-sig"))
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
    except (*_PILLOW_ERRORS, zipfile.BadZipFile, lzma.LZMAError, tokenize.TokenError, MemoryError):
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
    """Texts of one caption each to one batch, padded to the longest; unmasked where none is masked or padded."""
    length = max(text.states.shape[1] for text in texts)
    states = torch.zeros(len(texts), length, texts[0].states.shape[2])
    mask = torch.zeros(len(texts), length, dtype=torch.bool)
    for number, text in enumerate(texts):
        states[number, : text.states.shape[1]] = text.states[0]
        mask[number, : text.states.shape[1]] = True if text.mask is None else text.mask[0]
    unmasked = all(text.mask is None for text in texts) and bool(mask.all())
    return Text(states, None if unmasked else mask, torch.cat([text.pooled for text in texts]))
