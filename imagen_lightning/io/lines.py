"""Text to lines, and lines to cells, as files have them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any


def lines(text: str) -> list[str]:
    r"""Return the lines of a text without their ends, which are `\n`, `\r\n` and `\r` alone.

    `str.splitlines` also cuts at form feeds, U+0085, U+2028 and others, which JSON and captions may hold within a line.
    """
    return [line.removesuffix("\n") for line in io.StringIO(text, newline=None)]


def is_step(cell: str) -> bool:
    """Return whether a table's cell is a number of steps: decimal, of at most 18 digits."""
    return cell.isdecimal() and len(cell) <= 18


def cell_reader(lines: Iterable[str], tabs: bool) -> Any:
    """Return a `csv.reader` of a CSV, whose quotation marks must close, or of a TSV: published ones quote nothing."""
    return csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(lines, strict=True)
