"""A stage's weights in a cascade folder: safetensors, checked by name, shape and SHA-256."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from imagen_lightning.cascade.local import file_sha256, first_line
from imagen_lightning.cascade.manifest import MANIFEST, read_manifest
from imagen_lightning.cascade.sampling import find_stage
from imagen_lightning.types import InputError


def load_weights(stage: nn.Module, reference: str) -> None:
    """Gives a stage the weights of one in a cascade folder, and nothing else of it (`init_from`).

    Args:
        stage: of the same architecture.
        reference: "CASCADE#stage", the folder and the stage's name or number: "runs/quickstart/cascade#base".

    Raises:
        InputError: no such cascade or stage, damaged weights, or weights that do not fit.
    """
    folder, separator, name = reference.rpartition("#")
    if not separator:
        raise InputError(f"init_from {reference!r} names no stage; write CASCADE#stage, e.g. {reference}#base")
    path, manifest = read_manifest(folder)
    entry = manifest["stages"][find_stage([entry["name"] for entry in manifest["stages"]], name)]
    load_stage_weights(stage, path.parent, entry, f"stage {entry['name']!r} of {path}")


def check_tensors(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Raises InputError where the tensors are not, by name and shape, those of the module."""
    wanted = module.state_dict()
    missing, foreign = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    for problem, keys in (("lack", missing), ("have, beyond the stage's,", foreign)):
        if keys:
            others = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise InputError(f"weights of {what} {problem} {keys[0]!r}{others}: they belong to another architecture")
    for key, value in wanted.items():
        if value.shape != tensors[key].shape:
            raise InputError(
                f"weights of {what}: {key!r} has shape {tuple(tensors[key].shape)}, the stage needs "
                f"{tuple(value.shape)}; they belong to another architecture"
            )


def load_stage_weights(module: nn.Module, folder: Path, entry: Mapping[str, Any], what: str) -> None:
    name = entry["weights"]["file"]
    path = folder / name
    if Path(name).name != name or path.suffix != ".safetensors":
        raise InputError(f"weights {name!r} of stage {entry['name']!r} must be a .safetensors file in {folder}")
    if not path.is_file():
        raise InputError(f"weights {str(path)!r} of stage {entry['name']!r} are missing; copy the whole cascade folder")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"weights {str(path)!r} are damaged ({first_line(error)}); copy the cascade again") from error
    check_tensors(module, tensors, what)
    if file_sha256(path) != entry["weights"].get("sha256"):
        raise InputError(f"weights {str(path)!r} are not those that {MANIFEST} was written with: their SHA-256 differs")
    module.load_state_dict(tensors)
