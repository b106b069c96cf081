"""The folder of class images that `imagen-lightning class-images` draws, and its record.

`OUT/class_images.json` says which cascade drew them, from which captions and how; `OUT/STAGE/00000.png` and
`00000.txt`, … are what each stage made and its caption, image i of all stages being of one drawing. The record is
written last: a folder that has it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imagen_lightning.errors import InputError

RECORD = "class_images.json"
FORMAT = "imagen-lightning class images"
VERSION = 1


def partial_folder(out: Path) -> Path:
    """Where class images are drawn before all of them are there."""
    return out.with_name(out.name + ".partial")


def read_record(folder: Path) -> dict[str, Any] | None:
    """What the record of a folder says; None where it has none.

    Raises:
        InputError: it is damaged, or of a later format.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); draw the class images anew") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(f"{path} is no record of class images; draw them anew")
    if record.get("version") != VERSION:
        raise InputError(
            f"{path} is of version {record.get('version')!r}; this imagen-lightning reads {VERSION}: draw the images "
            "anew, or use a newer one"
        )
    if not all(isinstance(entry, Mapping) and {"stage", "image_size"} <= entry.keys() for entry in record["stages"]):
        raise InputError(f"{path} is damaged: each of its stages needs stage and image_size; draw them anew")
    return record


def find_class_images(folder: Path, image_size: int) -> Path:
    """The folder of the class images of a size: of the stage that makes it, or `folder` itself where it has no record.

    Raises:
        InputError: no such folder, class images that are not whole, or none of that size.
    """
    if not folder.exists() and partial_folder(folder).exists():
        raise InputError(
            f"class images {str(folder)!r} are not all drawn; the command that began them goes on with the rest"
        )
    if not folder.exists():
        raise InputError(f"class images {str(folder)!r} do not exist; `imagen-lightning class-images` draws them")
    record = read_record(folder)
    if record is None:
        return folder
    sizes = {entry["image_size"]: entry["stage"] for entry in record["stages"]}
    if image_size not in sizes:
        there = ", ".join(f"{size} ({stage})" for size, stage in sizes.items())
        raise InputError(
            f"class images {str(folder)!r} are of {there} px and the instance images of {image_size} px; set the "
            "instance's image_size to the stage's, or draw class images with that stage"
        )
    return folder / str(sizes[image_size])


def check_parent(folder: Path, origin: Mapping[str, Any] | None) -> None:
    """Compares the cascade that drew class images with the one that a stage in training starts from.

    Where either is not known there is nothing to compare: images without a record, a stage that was never a cascade's.

    Args:
        folder: of the class images.
        origin: of the stage (see `imagen_lightning.cascade.origin`).

    Raises:
        InputError: it is another.
    """
    record = read_record(folder)
    drew = record.get("weights") if record is not None else None
    parents = origin.get("parents") if origin is not None else None
    if not isinstance(drew, Mapping) or not isinstance(parents, list):
        return
    for parent in parents:
        name = parent.get("stage")
        if name in drew and drew[name] != parent.get("sha256"):
            raise InputError(
                f"class images {str(folder)!r} were drawn by another cascade: the weights of its stage {name!r} have "
                f"SHA-256 {_start(drew[name])}, and the stage starts from {parent.get('cascade')!r}, whose have "
                f"{_start(parent.get('sha256'))}; draw them with that one, or give {str(folder / name)!r} to take them "
                "nevertheless"
            )


def _start(digests: Any) -> str:
    """The first digits of a list of SHA-256."""
    found = digests if isinstance(digests, list) and digests else ["unknown"]
    return f"{str(found[0])[:12]}…"
