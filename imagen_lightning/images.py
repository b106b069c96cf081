"""The one resize, value ranges, grids.

Inside a stage images are float in [-1, 1]; at the loader and in files they are uint8.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from imagen_lightning.io.atomic import write_bytes
from imagen_lightning.types import InputError


def to_float(images: Tensor) -> Tensor:
    """uint8 (…, H, W) in [0, 255] to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def are_finite(images: Tensor) -> Tensor:
    """Return (B,) bool, whether each of the images (B, …) is free of NaN and infinite values."""
    return images.isfinite().flatten(1).all(1) if images.dim() > 1 else images.isfinite()


def to_uint8(images: Tensor) -> Tensor:
    """Return float images in [-1, 1] (values beyond are clamped) as uint8, rounded to nearest.

    Raises:
        InputError: NaN or infinite values, of which uint8 would make black or white.
    """
    if not bool(are_finite(images).all()):
        raise InputError("images hold NaN or infinite values, which no image file can show")
    return ((images.float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)


def downsample(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Antialiased area resize of float (B, C, H, W) to a side, or a height and width, of at most H and W.

    The one filter by which low-resolution images are made, in training and in evaluation: each output pixel is the mean
    of the input pixels that it touches (all of them in full, so that areas overlap where the sizes do not divide).
    """
    height, width = (size, size) if isinstance(size, int) else size
    if images.shape[-2:] == (height, width):
        return images
    if height > images.shape[-2] or width > images.shape[-1]:
        raise ValueError(f"downsample to {size} px asked of {tuple(images.shape[-2:])} px images; use upsample")
    return F.interpolate(images, size=(height, width), mode="area")


def upsample(images: Tensor, size: int | tuple[int, int], align_corners: bool = False) -> Tensor:
    """Bilinear resize of float (B, C, H, W) to a side, or a height and width.

    Pixels lie at half-pixel centres; with align_corners the corner pixels' centres lie at the image's corners.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, size=(height, width), mode="bilinear", align_corners=align_corners)


def placeholder(height: int, width: int) -> Tensor:
    """Return a magenta checkerboard, which stands in the place of an image that is not finite: uint8 (3, H, W)."""
    cells = (torch.arange(height)[:, None] * 4 // height + torch.arange(width) * 4 // width) % 2
    return torch.stack([cells * 255, torch.zeros_like(cells), cells * 255]).to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """One uint8 (3, H, W) tensor to a PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy(), "RGB")


def from_pil(image: Image.Image) -> Tensor:
    """One RGB PIL image to uint8 (3, H, W)."""
    image = image if image.mode == "RGB" else image.convert("RGB")
    planes = bytearray().join(image.tobytes("raw", channel) for channel in "RGB")
    return torch.frombuffer(planes, dtype=torch.uint8).view(3, image.height, image.width)


def grid(
    rows: Sequence[Sequence[Tensor]], captions: Sequence[str] | None = None, *, cell: int | None = None, gap: int = 4
) -> Image.Image:
    """Lays uint8 (3, H, W) images out in rows on white; `captions`, one a cell in reading order, stand under them.

    Args:
        rows: the images, row by row; rows may differ in length.
        captions: texts, wrapped to the cell's width and cut after four lines.
        cell: side of a cell in pixels; smaller images are enlarged by nearest neighbour. Default: the largest image.
        gap: pixels between cells.
    """
    cell = cell or max(max(image.shape[-2:]) for row in rows for image in row)
    font_size = max(10, min(13, cell // 10))
    font, line_height = ImageFont.load_default(size=font_size), font_size + 3
    lines = [_wrap(caption, font, cell)[:4] for caption in captions] if captions is not None else []
    columns = max(len(row) for row in rows)
    under = iter([*lines, *[[]] * sum(map(len, rows))])
    texts = [[next(under) for _ in row] for row in rows]
    heights = [cell + gap + max((len(item) for item in row), default=0) * line_height for row in texts]
    canvas = Image.new("RGB", (columns * (cell + gap) + gap, sum(heights) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    y = gap
    for row, words, height in zip(rows, texts, heights):
        for c, (image, item) in enumerate(zip(row, words)):
            x = gap + c * (cell + gap)
            picture = to_pil(image)
            if picture.size != (cell, cell):
                picture = picture.resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(picture, (x, y))
            draw.multiline_text((x, y + cell + 1), "\n".join(item), fill="black", font=font, spacing=3)
        y += height
    return canvas


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(word)
    return lines


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all.

    Raises:
        OSError: it cannot be written; it names `path`.
    """
    data = BytesIO()  # Pillow's own writing forgets what was wrong with the disk
    image.save(data, format="PNG")
    write_bytes(path, data.getbuffer())
