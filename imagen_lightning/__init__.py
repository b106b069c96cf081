"""Experiments with cascaded pixel diffusion from text, on PyTorch Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imagen_lightning.cascade import Cascade

__version__ = "0.1.0"
__all__ = ["Cascade", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy: importing the package imports no torch.
    if name == "Cascade":
        from imagen_lightning.cascade import Cascade

        return Cascade
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
