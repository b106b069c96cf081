"""Square images that are read as they are needed, so that an evaluation of any number of them fits into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from imagen_lightning.images import downsample, to_float, to_uint8

LARGEST_KEPT = 1 << 30  # bytes of images that a set may hold


class ImageSet:
    """N images of one size by their numbers.

    Args:
        count: N.
        size: side in pixels.
        read: gives image i, (3, size, size) uint8.
        keep: whether images once read stay in memory, where all of them take at most LARGEST_KEPT bytes.
    """

    def __init__(self, count: int, size: int, read: Callable[[int], Tensor], keep: bool = False) -> None:
        self.size = size
        self._count = count
        self._read = read
        self._keep = keep and count * 3 * size * size <= LARGEST_KEPT
        self._kept: dict[int, Tensor] = {}

    @classmethod
    def of(cls, images: Tensor) -> ImageSet:
        """Those of an (N, 3, S, S) uint8 tensor."""
        return cls(len(images), images.shape[-1], images.__getitem__)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rows: slice) -> Tensor:
        """(B, 3, size, size) uint8, B at least 1."""
        return torch.stack([self._image(number) for number in range(*rows.indices(self._count))])

    def blocks(self, size: int) -> Iterator[slice]:
        """The rows of all images, `size` at a time."""
        return (slice(start, min(start + size, self._count)) for start in range(0, self._count, size))

    def reduced(self, size: int) -> ImageSet:
        """The images at a smaller side, by the area filter."""
        if size == self.size:
            return self
        return ImageSet(self._count, size, lambda number: reduce(self[number : number + 1], size)[0])

    def _image(self, number: int) -> Tensor:
        if number in self._kept:
            return self._kept[number]
        image = self._read(number)
        if self._keep:
            self._kept[number] = image
        return image


def reduce(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, H) uint8 to (B, 3, size, size) uint8 by the area filter."""
    return images if images.shape[-1] == size else to_uint8(downsample(to_float(images), size))
