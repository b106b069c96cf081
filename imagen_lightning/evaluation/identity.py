"""Which images a cascade makes: those of other weights, another text encoder or other settings are others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from imagen_lightning.cascade import MANIFEST, Cascade, StageSettings, weight_files
from imagen_lightning.cascade.sampling import text_identity
from imagen_lightning.cascade.weights import shapes_only


def weights_sha256(folder: str | Path) -> str:
    """A hash of the weights of all stages."""
    digests = {entry["name"]: [sha256 for _, sha256 in weight_files(entry)] for entry in _stages(folder)}
    # One file is named as it was before there could be several.
    return _digest([(name, one[0] if len(one) == 1 else one) for name, one in digests.items()])


def drawing_sha256(folder: str | Path, cascade: Cascade) -> str:
    """Return a hash of what makes a cascade's images besides settings, captions and seed: weights, text encoders.

    The manifest's other contents do not count: settings are counted where images are named, as they are used.

    Args:
        folder: of the cascade.
        cascade: loaded from it.
    """
    return _digest([weights_sha256(folder), [text_identity(stage) for stage in cascade.stages]])


def settings_sha256(points: Iterable[Sequence[StageSettings]]) -> str:
    """Return a hash of the settings of stages at one or more operating points."""
    return _digest([[setting.described() for setting in point] for point in points])


def images_sha256(folder: str | Path, trust: Iterable[str], guidance: Any = None, steps: Any = None) -> str:
    """Return a hash of all that decides a cascade's images but captions, seed and precision; loads no weights.

    Args:
        folder: of the cascade.
        trust: packages besides this one whose classes the manifest may name.
        guidance, steps: as `Cascade.sample` takes them.

    Raises:
        InputError: what `Cascade.load` and `Cascade.settings` refuse.
    """
    with shapes_only():
        cascade = Cascade.load(folder, trust=trust)
    return _digest([drawing_sha256(folder, cascade), settings_sha256([cascade.settings(guidance, steps)])])


def _stages(folder: str | Path) -> Any:
    return json.loads((Path(folder).expanduser() / MANIFEST).read_text(encoding="utf-8"))["stages"]


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
