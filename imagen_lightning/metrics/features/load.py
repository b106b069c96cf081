"""An extractor from a YAML file."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from imagen_lightning.components import find_class
from imagen_lightning.errors import InputError
from imagen_lightning.files import read_text
from imagen_lightning.io.yaml import MAX_BYTES, read_yaml
from imagen_lightning.metrics.features.base import FeatureExtractor

_OWN = "imagen_lightning.metrics.features"


def load_extractor(path: Path, trust: Iterable[str] = ()) -> FeatureExtractor:
    """Makes the extractor that a YAML file describes by `class_path` and `init_args`, as in a stage's configuration.

    ```yaml
    class_path: imagen_lightning.metrics.features.OnnxFeatures
    init_args: {path: dinov2.onnx, size: 224, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}
    ```

    Args:
        path: the YAML file; paths in it are relative to where the command runs, as everywhere.
        trust: packages beside this one that a class may come from.

    Raises:
        InputError: no such file, no YAML, a class that is no extractor or of a package not trusted, arguments that it
            does not take.
    """
    what = "extractor description"
    data = read_yaml(read_text(path, what, MAX_BYTES), f"{what} {str(path)!r}")
    if not isinstance(data, dict) or set(data) - {"class_path", "init_args"} or "class_path" not in data:
        raise InputError(f"extractor description {str(path)!r} needs class_path and init_args, and nothing else")
    cls = _find(str(data["class_path"]), trust)
    arguments = data.get("init_args") or {}
    if not isinstance(arguments, dict):
        raise InputError(f"init_args of {str(path)!r} must be names and values")
    try:
        inspect.signature(cls).bind(**arguments)
    except TypeError as error:
        raise InputError(f"{str(path)!r}: {data['class_path']} {error}") from error
    return cls(**arguments)


def _find(class_path: str, trust: Iterable[str]) -> type[FeatureExtractor]:
    import imagen_lightning.metrics.features as own

    package, _, name = class_path.rpartition(".")
    found: Any = getattr(own, name, None) if package == _OWN else find_class(class_path, trust)
    if not (isinstance(found, type) and issubclass(found, FeatureExtractor)) or inspect.isabstract(found):
        known = [item for item in own.__all__ if item.endswith("Features")]
        raise InputError(f"{class_path!r} is no feature extractor; in {_OWN} there are {', '.join(known)}")
    return found
