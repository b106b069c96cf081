"""One picture a row of an evaluation, to look at."""

from __future__ import annotations

from pathlib import Path

from imagen_lightning.evaluation.drawing import Drawn
from imagen_lightning.images import grid, save_png, to_float, to_uint8, upsample

NUM_IMAGES = 24
COLUMNS = 6
CELL = 128


def save_picture(drawn: Drawn, captions: list[str], path: Path) -> None:
    """The first images with their captions; where the stage was given images, those stand to their left."""
    count = min(NUM_IMAGES, len(captions))
    size = drawn.images.shape[-1]
    cell = max(CELL // size, 1) * size
    cells, texts = [], []
    for index in range(count):
        if drawn.given is not None:
            cells.append(to_uint8(upsample(to_float(drawn.given[index : index + 1]), size))[0])
            texts.append("given")
        cells.append(drawn.images[index])
        texts.append(captions[index])
    rows = [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]
    save_png(grid(rows, texts, cell=cell), path)
