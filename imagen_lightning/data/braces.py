"""Patterns of braces, such as `train-{00000..00009}.tar`, to names: counted before they are expanded."""

from __future__ import annotations

import math
import re
import string

from imagen_lightning.errors import InputError

MAX_SHARDS = 1_000_000

_INNERMOST = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d{1,4300}|[A-Za-z])\.\.(-?\d{1,4300}|[A-Za-z])(?:\.\.-?(\d{1,4300}))?")
_COUNT = re.compile("\0([0-9]+)\0")
_MAX_SAID = 10**30


def expand_braces(pattern: str) -> list[str]:
    """Return the names that a pattern of braces stands for.

    Raises:
        InputError: the braces do not pair, or the names are more than MAX_SHARDS.
    """
    from braceexpand import braceexpand

    count = count_names(pattern)
    if count > MAX_SHARDS:
        said = f"{count:,}" if count < _MAX_SAID else f"more than {_MAX_SAID:.0e}"
        raise InputError(f"shards {pattern!r} name {said} shards; give a pattern of at most {MAX_SHARDS:,}")
    try:
        return list(braceexpand(pattern))
    except (ValueError, RecursionError):
        raise InputError(f"shards {pattern!r}: the braces do not pair") from None


def count_names(pattern: str) -> int:
    """Return how many names a pattern stands for, without expanding it."""

    def counted(group: re.Match[str]) -> str:
        found = _RANGE.fullmatch(group[1])
        if found:
            first, last = map(_place, found.group(1, 2))
            count = abs(last - first) // max(int(found[3] or 1), 1) + 1
        else:
            count = sum(map(_product, group[1].split(",")))
        return f"\0{min(count, _MAX_SAID)}\0"

    text, num_groups = pattern.replace("\0", ""), 1
    while num_groups:
        text, num_groups = _INNERMOST.subn(counted, text)
    return _product(text)


def _place(end: str) -> int:
    """Return an end of a range as a number: letters count A to Z, a to z."""
    return (string.ascii_uppercase + string.ascii_lowercase).index(end) if end.isalpha() else int(end)


def _product(text: str) -> int:
    return math.prod(map(int, _COUNT.findall(text)))
