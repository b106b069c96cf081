"""Text to lines as files have them."""

from __future__ import annotations

import io


def lines(text: str) -> list[str]:
    r"""Return the lines of a text without their ends, which are `\n`, `\r\n` and `\r` alone.

    `str.splitlines` also cuts at form feeds, U+0085, U+2028 and others, which JSON and captions may hold within a line.
    """
    return [line.removesuffix("\n") for line in io.StringIO(text, newline=None)]
