"""Captioned images: shards, the order in which a run sees them, decoding, and the DataModules."""

from importlib import import_module
from typing import Any

_MODULES = {
    "DreamBoothDataModule": "dreambooth",
    "FolderDataModule": "folder_datamodule",
    "LaionDataModule": "datamodule",
    "ShapesDataModule": "datamodule",
    "StreamingLaionDataModule": "stream_datamodule",
    "SubjectShapesDataModule": "datamodule",
}

__all__ = [
    "DreamBoothDataModule",
    "FolderDataModule",
    "LaionDataModule",
    "ShapesDataModule",
    "StreamingLaionDataModule",
    "SubjectShapesDataModule",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: the DataModules need lightning, drawing shapes and writing shards do not.
    if name in _MODULES:
        return getattr(import_module(f"imagen_lightning.data.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
