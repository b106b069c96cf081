"""What the modules of diffusion share."""

from __future__ import annotations

from torch import Tensor


def per_image(value: Tensor, images: Tensor) -> Tensor:
    """(B,) to (B, 1, 1, 1), in the images' dtype."""
    return value.to(images.dtype).view(-1, *[1] * (images.dim() - 1))
