"""Captioned images: shards, the order in which a run sees them, decoding, and the DataModules."""

from typing import Any

__all__ = ["LaionDataModule", "ShapesDataModule"]


def __getattr__(name: str) -> Any:
    # Imported on first use: the DataModules need lightning, drawing shapes and writing shards do not.
    if name in __all__:
        from imagen_lightning.data import datamodule

        return getattr(datamodule, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
