"""Features that are not finite are refused: a distance of them would be a number all the same."""

from __future__ import annotations

from torch import Tensor

from imagen_lightning.errors import InputError, counted


def check_finite(*sets: Tensor) -> None:
    """Refuse features (N, D), or their sums, that are NaN or infinite.

    Raises:
        InputError: with the number of images.
    """
    for features in sets:
        bad = int((~features.isfinite().flatten(1).all(dim=1)).sum())
        if bad:
            raise InputError(
                f"features of {counted(bad, 'image')} are not finite; look at the images and the extractor"
            )
