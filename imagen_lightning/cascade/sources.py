"""What a cascade is joined from: checkpoints, run folders, other cascades and single stages of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from imagen_lightning.cascade.checkpoints import stage_from_checkpoint
from imagen_lightning.cascade.folder import read_folder, read_stage
from imagen_lightning.cascade.manifest import MANIFEST
from imagen_lightning.cascade.origin import merged_record
from imagen_lightning.cascade.weights import find_entry
from imagen_lightning.stages import DiffusionMixin


def stages_of(source: str | Path, trust: tuple[str, ...]) -> Iterator[DiffusionMixin]:
    """The stages, on the CPU, that a source names, their adapters merged.

    Args:
        source: a .ckpt file, a run folder, "CASCADE#stage", or a cascade folder.
        trust: packages beside this one whose classes it may name.
    """
    path = Path(source).expanduser()
    if (path / MANIFEST).is_file():
        stages, _ = read_folder(source, trust)
    elif "#" in str(source) and not path.exists():
        stages = [read_stage(*find_entry(str(source), "stage"), trust)]
    else:
        stages = [stage_from_checkpoint(source, trust)]
    for stage in stages:
        if stage.adapter is not None:
            parents = (stage.origin or {}).get("parents") or [{}]
            stage.weights_record = merged_record(parents[0].get("weights"), [stage.weights_record])
            stage.merge_adapter()
        yield stage
