"""Two cascades of the same stages: whether they may be compared, and which of their weights differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from imagen_lightning.cascade import weight_files
from imagen_lightning.cascade.manifest import read_manifest
from imagen_lightning.errors import InputError

_SHAPE = ("name", "image_size", "low_res_size")


def match(before: str, after: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The manifests' entries of both cascades, stage by stage.

    Raises:
        InputError: no cascade; other stages or sizes, named.
    """
    sides = [read_manifest(folder)[1]["stages"] for folder in (before, after)]
    names = [[entry["name"] for entry in side] for side in sides]
    if names[0] != names[1]:
        raise InputError(
            f"{before!r} has the stages {', '.join(names[0])}, {after!r} {', '.join(names[1])}; give a cascade before "
            "and after fine-tuning, of the same stages"
        )
    pairs = list(zip(*sides))
    for old, new in pairs:
        for key in _SHAPE:
            if old.get(key) != new.get(key):
                raise InputError(
                    f"stage {old['name']!r}: {key} is {old.get(key)} in {before!r} and {new.get(key)} in {after!r}; "
                    "pictures of other sizes cannot be compared"
                )
    return pairs


def changes(before: str, after: str) -> list[dict[str, Any]]:
    """What became of each stage: {"name", "parameters", "changed", "added", "removed", "origin"}; all in numbers.

    Tensors are read one at a time.
    """
    found = []
    for old, new in match(before, after):
        counts = {"parameters": 0, "changed": 0, "added": 0, "removed": 0}
        with ExitStack() as stack:
            olds, news = (
                _Tensors(stack, Path(folder).expanduser(), entry) for folder, entry in ((before, old), (after, new))
            )
            for name in news:
                counts["parameters"] += (tensor := news[name]).numel()
                if name not in olds:
                    counts["added"] += tensor.numel()
                elif not _equal(olds[name], tensor):
                    counts["changed"] += tensor.numel()
            counts["removed"] = sum(olds[name].numel() for name in olds if name not in news)
        found.append(
            {"name": new["name"], **counts, "origin": {"before": old.get("origin"), "after": new.get("origin")}}
        )
    return found


def is_trained(stages: list[dict[str, Any]]) -> bool:
    """Whether any weight differs."""
    return any(stage[key] for stage in stages for key in ("changed", "added", "removed"))


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first, second.to(first.dtype))


class _Tensors:
    """The tensors of a stage's files by name, read as they are asked for."""

    def __init__(self, stack: ExitStack, folder: Path, entry: Mapping[str, Any]) -> None:
        self._files: dict[str, Any] = {}
        for name, _ in weight_files(entry):
            try:
                file = stack.enter_context(safe_open(folder / name, "pt"))
            except (SafetensorError, OSError) as error:
                raise InputError(f"weights {str(folder / name)!r} cannot be read ({error})") from None
            self._files.update(dict.fromkeys(file.keys(), file))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor
