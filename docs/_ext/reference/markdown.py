"""Markdown of generated pages: escaped text, tables, and files that are written where they changed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path


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


def write(path: Path, content: str) -> None:
    """Write a page, unless it is there already: Sphinx reads what is newer than its last build."""
    if not path.exists() or path.read_text() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
