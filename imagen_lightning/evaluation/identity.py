"""Which cascade a folder holds: one that is trained on, or set otherwise, is another one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from imagen_lightning.cascade import MANIFEST, weight_files


def weights_sha256(folder: str | Path) -> str:
    """A hash of the weights of all stages."""
    digests = {entry["name"]: [sha256 for _, sha256 in weight_files(entry)] for entry in _stages(folder)}
    # One file is named as it was before there could be several.
    return _digest([(name, one[0] if len(one) == 1 else one) for name, one in digests.items()])


def cascade_sha256(folder: str | Path) -> str:
    """A hash of weights and of how the manifest has them sampled."""
    return _digest(_stages(folder))


def _stages(folder: str | Path) -> Any:
    return json.loads((Path(folder).expanduser() / MANIFEST).read_text(encoding="utf-8"))["stages"]


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
