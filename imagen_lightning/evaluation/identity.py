"""Which cascade a folder holds: one that is trained on, or set otherwise, is another one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from imagen_lightning.cascade import MANIFEST


def weights_sha256(folder: str | Path) -> str:
    """A hash of the weights of all stages."""
    return _digest([(entry["name"], entry["weights"]["sha256"]) for entry in _stages(folder)])


def cascade_sha256(folder: str | Path) -> str:
    """A hash of weights and of how the manifest has them sampled."""
    return _digest(_stages(folder))


def _stages(folder: str | Path) -> Any:
    return json.loads((Path(folder).expanduser() / MANIFEST).read_text(encoding="utf-8"))["stages"]


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
