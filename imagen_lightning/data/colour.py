"""Decoded pictures of every kind to 8-bit sRGB."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image

_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # of an ICC profile, by Pillow's mode
_SAME = 2  # levels of 255 by which a profile that is sRGB may differ from sRGB by rounding


def to_srgb(image: Image.Image) -> Image.Image:
    """A loaded image to RGB in sRGB.

    16 bits are scaled to 8, palettes looked up, transparency put on white, colours taken from the embedded ICC profile
    to sRGB (perceptual intent) where there is one of the image's kind; a damaged profile, or one of another kind, is
    passed over, and colours without one are taken for sRGB. CMYK without one is (255 - ink)(255 - black) / 255.

    An image that is sRGB already is returned as it is.
    """
    profile = image.info.pop("icc_profile", None)  # so that nobody saves it with colours that it does not describe
    if image.mode == "RGB" and not profile and "transparency" not in image.info:
        return image
    alpha = None
    if image.mode.startswith("I"):
        image, alpha = _from_16_bits(image)
    elif image.has_transparency_data:
        grey = Image.getmodebase(image.mode) == "L"
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.getchannel("R") if grey else image.convert("RGB")
    elif image.mode not in _SPACES:
        image = image.convert(Image.getmodebase(image.mode))
    if profile:
        image = _from_profile(image, profile)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if alpha is None:
        return image
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=alpha)
    return white


def rescale_key(image: Image.Image) -> None:
    """Brings the transparent colour of a PNG that is not yet loaded from its file's depth to that of its pixels.

    Pillow scales 2 and 4 bits up and keeps the high byte of 16 bits of colour, and leaves the colour as it was written.
    """
    key = image.info.get("transparency")
    tiles = getattr(image, "tile", [])
    raw = tiles[0].args if tiles else None
    if key is not None and raw in ("L;2", "L;4"):
        image.info["transparency"] = key * 255 // (3 if raw == "L;2" else 15)
    elif key is not None and raw == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _from_16_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Grey of 16 bits to 8, rounded, and its alpha where one value is transparent."""
    grey = np.asarray(image).astype(np.int64).clip(0, 65535)
    key = image.info.get("transparency")
    alpha = None if key is None else Image.fromarray(np.where(grey == key, 0, 255).astype(np.uint8))
    return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)), alpha


def _from_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """L, RGB or CMYK by its profile to RGB; as it is where the profile changes nothing or cannot be used."""
    change = _change(profile, image.mode)
    return image if change is None else change(image)


@lru_cache(maxsize=32)
def _change(profile: bytes, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    """What brings images of a mode from a profile's colours to sRGB; None where nothing can, or needs to.

    A profile is known for sRGB by what it does, not by its name, once for all the images that bear it.
    """
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        stored, mode = mode, "RGB" if mode == "L" and space == "RGB" else mode  # grey in one channel of three
        if space != _SPACES[mode]:
            return None
        # precalculated, the few nodes that LittleCMS gives a curve of grey miss a steep one by 10 levels
        flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", flags=flags)
        probe = _probe(mode)
        changed = transform.apply(probe)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError):
        return None
    if mode == "L":
        tables = [channel.tobytes() for channel in changed.split()]
        return lambda image: Image.merge("RGB", [image.point(table) for table in tables])
    if mode == "RGB" and np.abs(np.asarray(changed, dtype=int) - np.asarray(probe, dtype=int)).max() <= _SAME:
        return None
    return transform.apply if stored == mode else lambda image: transform.apply(image.convert(mode))


def _probe(mode: str) -> Image.Image:
    """An image of colours from all over a space."""
    step = {"L": 1, "RGB": 15, "CMYK": 51}[mode]
    axes = np.meshgrid(*[np.arange(0, 256, step, dtype=np.uint8)] * len(mode), indexing="ij")
    return Image.frombytes(mode, (axes[0].size, 1), np.stack(axes, axis=-1).tobytes())
