"""What the commands' parsers share: bounded types and common options; imports no torch, so that `--help` is quick."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from imagen_lightning.errors import InputError, counted

MAX_SEED = 2**63 - 1
MAX_IMAGES = 1_000_000  # of one command: more would take weeks, and is most likely a slip


class Parser(argparse.ArgumentParser):
    """An ArgumentParser of one command, whose errors are InputErrors; options are written out."""

    def __init__(self, command: str, **kwargs: Any) -> None:
        super().__init__(prog=f"imagen-lightning {command}", allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")

    def add_trust(self) -> None:
        self.add_argument(
            "--trust",
            metavar="PACKAGE",
            action="append",
            default=[],
            help="also let this installed package's classes be used (their code runs); may be given several times",
        )

    def add_sampling(
        self,
        *settings: str,
        batch_size: int = 32,
        each: str = "; one value, or one a stage as in %(metavar)s (default: the cascade's)",
    ) -> None:
        """Add the options of every command that samples: seed, batch size, device, precision, and some `settings`.

        Args:
            settings: of "guidance", "steps", "sampler" and "aug-level".
            batch_size: its default.
            each: the end of a setting's help.
        """
        group = self.add_argument_group("sampling")
        group.add_argument(
            "--seed", type=SEED, default=0, help="image i's noise depends on the seed and i alone (default %(default)s)"
        )
        for name in settings:
            kind, example, text = _SETTINGS[name]
            group.add_argument(f"--{name}", type=one_or_each(kind), metavar=example, help=text + each)
        group.add_argument(
            "--batch-size",
            type=whole(1, MAX_IMAGES),
            default=batch_size,
            metavar="N",
            help="images at a time (default %(default)s)",
        )
        group.add_argument("--device", help="cpu, cuda, cuda:1, mps … (default: cuda where there is one)")
        group.add_argument(
            "--precision", choices=["32", "bf16"], default="32", help="of the networks (default %(default)s)"
        )


def whole(low: int, high: int) -> Callable[[str], int]:
    """Return the type of an option that takes a whole number in [low, high]."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number in [{low}, {high}]") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{shown(text)} is outside [{low}, {high}]")
        return value

    return parse


def real(low: float, high: float, *, open_low: bool = False) -> Callable[[str], float]:
    """Return the type of an option that takes a number in [low, high], or in (low, high]; never nan or inf."""
    interval = f"{'(' if open_low else '['}{low:g}, {high:g}]"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a number in {interval}") from None
        if not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
            raise argparse.ArgumentTypeError(f"{shown(text)} is outside {interval}")
        return value

    return parse


def one_or_each(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return the type of an option that takes one value, or several with commas between them."""

    def parse(text: str) -> Any:
        values = several(kind)(text)
        return values[0] if len(values) == 1 else values

    return parse


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Return the type of an option that takes one value or more with commas between them."""

    def parse(text: str) -> list[Any]:
        return [kind(part.strip()) for part in text.split(",")]

    return parse


def folder(text: str) -> Path:
    """Parse the folder that a command writes to, which exists or can be made."""
    path = _writable(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{shown(text)} is a file; give a folder")
    return path


def file(text: str) -> Path:
    """Parse the file that a command writes."""
    path = _writable(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{shown(text)} is a folder; give a file")
    return path


def new_file(text: str) -> Path:
    """Parse the file that a command writes, where none is."""
    path = file(text)
    if path.exists():
        raise argparse.ArgumentTypeError(f"{shown(text)} exists; choose another file")
    return path


def _writable(text: str) -> Path:
    """The path, once it is known that what holds it is a folder in which this user may write."""
    path = Path(text)
    try:
        there = next(above for above in (path, *path.absolute().parents) if above.exists())
    except OSError as error:  # a name that is too long
        raise argparse.ArgumentTypeError(f"{shown(text)} cannot be written: {error.strerror}") from None
    if not text.strip() or not path.absolute().name:  # the root folder has no name
        raise argparse.ArgumentTypeError(f"{text!r} is not a path")
    if there != path and not there.is_dir():
        raise argparse.ArgumentTypeError(f"{shown(text)} cannot be written: {shown(str(there))} is not a folder")
    try:
        with tempfile.TemporaryFile(dir=there if there.is_dir() else there.parent):  # os.access allows root anything
            return path
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} cannot be written: {error.strerror}") from None


def shown(text: str, most: int = 60) -> str:
    """Return the text in quotation marks, cut where it is long."""
    return repr(text if len(text) <= most else text[:most] + "…")


def captions_of(given: Sequence[str], file: str | None, missing: str | None) -> list[str]:
    """Return the captions of `--prompt`, then those of the prompt set `--prompts`.

    Args:
        given: captions as typed.
        file: a prompt set, or None.
        missing: what to say where there is no caption at all; None allows that.

    Raises:
        InputError: an empty caption, a file that cannot be read, or no caption.
    """
    for number, prompt in enumerate(given, 1):
        if not prompt.strip():
            raise InputError(f"--prompt number {number} is empty; give a caption")
    found = list(given)
    if file is not None:
        from imagen_lightning.evaluation.prompts import read_prompts

        found += read_prompts(file).captions
    if not found and missing is not None:
        raise InputError(f"{missing}; give --prompt or --prompts")
    return found


def refuse_many(num_captions: int, num_images: int) -> None:
    """Raise InputError where so many images of each caption are more than MAX_IMAGES."""
    if num_captions * num_images > MAX_IMAGES:
        raise InputError(
            f"--num-images {num_images} of {counted(num_captions, 'caption')} are {num_captions * num_images:,} "
            f"images; one command makes at most {MAX_IMAGES:,}"
        )


SEED = whole(0, MAX_SEED)
STEPS = whole(1, 10_000)
GUIDANCE = real(-10_000, 10_000)
FRACTION = real(0, 1)
NUM_IMAGES = whole(1, MAX_IMAGES)
WORKERS = whole(0, 1024)

_SETTINGS: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "guidance": (GUIDANCE, "3,1", "guidance weight, 1 for none"),
    "steps": (STEPS, "25,15", "sampling steps"),
    "sampler": (str, "dpmpp,ddim", "ddpm, ddim, dpmpp …"),
    "aug-level": (FRACTION, "0,0.1", "noise on the low-resolution image, in [0, 1]"),
}
