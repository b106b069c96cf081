"""One picture a row of an evaluation, to look at."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from imagen_lightning.evaluation.image_set import ImageSet
from imagen_lightning.images import grid, save_png, to_float, to_uint8, upsample

NUM_IMAGES = 24
COLUMNS = 6
CELL = 128


def save_picture(images: ImageSet, given: ImageSet | None, captions: list[str], path: Path) -> None:
    """The first images with their captions; where the stage was given images, those stand to their left."""
    shown = slice(min(NUM_IMAGES, len(captions)))
    size = images.size
    cells: list[Tensor] = list(images[shown])
    texts = captions[shown]
    if given is not None:
        enlarged = list(to_uint8(upsample(to_float(given[shown]), size)))
        cells = [cell for pair in zip(enlarged, cells) for cell in pair]
        texts = [text for caption in texts for text in ("given", caption)]
    rows = [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]
    save_png(grid(rows, texts, cell=max(CELL // size, 1) * size), path)
