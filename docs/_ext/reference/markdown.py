"""Markdown of generated pages: escaped text, tables, and contents."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def text(source: str) -> str:
    """Return plain text as Markdown of one line: everything but `code` is escaped."""
    parts = re.split(r"(`+[^`]+`+)", " ".join(source.split()))
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_<>\[\]{}#$])", r"\\\1", part) for part in parts)


def code(source: str) -> str:
    return f"`{source}`"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines) + "\n"


def toctree(pages: Iterable[str], depth: int = 1) -> str:
    return "\n".join([":::{toctree}", f":maxdepth: {depth}", "", *pages, ":::"]) + "\n"
