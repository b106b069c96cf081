"""What the verbs' command lines share; imports no torch, so that `--help` is quick."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from imagen_lightning.errors import InputError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser of one verb, whose errors are InputErrors; options are written out."""

    def __init__(self, verb: str, **kwargs: Any) -> None:
        super().__init__(prog=f"imagen-lightning {verb}", allow_abbrev=False, **kwargs)

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


def one_or_each(kind: type) -> Callable[[str], Any]:
    """The type of an option that takes one value, or several with commas between them."""

    def parse(text: str) -> Any:
        try:
            values = [kind(part.strip()) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__}, nor several with commas") from None
        return values[0] if len(values) == 1 else values

    return parse
