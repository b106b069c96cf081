"""Lightning checkpoints of stages, of which plain data and tensors alone are read."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251  (what torch.load raises where it refuses to unpickle)
from typing import Any

import torch

from imagen_lightning.cascade.description import as_module, build_stage
from imagen_lightning.cascade.local import first_line, refuse_address
from imagen_lightning.cascade.origin import check_origin, check_record
from imagen_lightning.cascade.weights import check_finite, check_tensors, put_tensors
from imagen_lightning.stages import DiffusionMixin
from imagen_lightning.types import InputError


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A Lightning checkpoint's plain data and tensors, the latter on the CPU and read as they are used.

    Raises:
        InputError: an address on the network; a file that is missing, empty or damaged, or holds Python objects.
    """
    refuse_address(path, "checkpoint")
    what = f"checkpoint {str(path)!r}"
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"{what} does not exist; give a local file, e.g. RUN/checkpoints/last.ckpt")
    if file.stat().st_size == 0:
        raise InputError(f"{what} is empty; take an earlier one")
    try:
        with zipfile.ZipFile(file) as archive:
            if (bad := archive.testzip()) is not None:  # torch.load does not look at checksums
                raise zipfile.BadZipFile(f"{bad} fails its checksum")
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise InputError(
            f"{what} cannot be read: it holds Python objects, which are never unpickled, or is damaged; give a "
            "checkpoint of this program, or take an earlier one"
        ) from error
    except zipfile.BadZipFile as error:
        raise InputError(f"{what} cannot be read: it is damaged ({first_line(error)}); take an earlier one") from error
    except Exception as error:
        # A damaged file can end its reader in any way; torch's own advice would be to unpickle it all the same.
        raise InputError(
            f"{what} cannot be read: it is damaged ({type(error).__name__}); take an earlier one"
        ) from error
    return checkpoint if isinstance(checkpoint, dict) else {}


def stage_from_checkpoint(path: str | Path, trust: tuple[str, ...]) -> DiffusionMixin:
    refuse_address(path, "checkpoint")
    file = checkpoint_file(Path(path).expanduser())
    what = f"checkpoint {str(file)!r}"
    checkpoint = read_checkpoint(file)
    parts = ("hyper_parameters", "state_dict")
    if not (
        isinstance(checkpoint.get("stage_class"), str)
        and all(isinstance(checkpoint.get(part), dict) for part in parts)
        and all(isinstance(value, torch.Tensor) for value in checkpoint["state_dict"].values())
    ):
        raise InputError(f"{what} is not one of an imagen-lightning stage; give the .ckpt of a run of this program")
    arguments = {name: value for name, value in checkpoint["hyper_parameters"].items() if name != "_instantiator"}
    description = {"class_path": checkpoint["stage_class"], "init_args": arguments}
    stage = build_stage(description, trust, what, [value.shape for value in checkpoint["state_dict"].values()])
    check_tensors(as_module(stage), checkpoint["state_dict"], what)
    for key, _ in as_module(stage).named_parameters():
        check_finite(key, checkpoint["state_dict"][key], what)
    # Copied from the file's mapping: the stage is to outlive the file.
    put_tensors(as_module(stage), {key: value.clone() for key, value in checkpoint["state_dict"].items()})
    stage.origin = check_origin(checkpoint.get("origin"), what)
    stage.weights_record = check_record(checkpoint.get("weights_record"), what)
    return stage


def checkpoint_file(path: Path) -> Path:
    """The file itself, or a run folder's latest checkpoint."""
    if not path.is_dir():
        return path
    folder = path / "checkpoints"
    numbered = [(re.fullmatch(r"step[-=](\d+)\.ckpt", file.name), file) for file in folder.glob("*.ckpt")]
    steps = [(int(match[1]), file) for match, file in numbered if match]
    if steps:  # before last.ckpt, which a run writes when it ends and which is older where it went on and was killed
        return max(steps)[1]
    if not (folder / "last.ckpt").exists():
        raise InputError(f"run folder {str(path)!r} has no checkpoints/step-*.ckpt or checkpoints/last.ckpt")
    return folder / "last.ckpt"
