"""Ends the build where a page would fetch something from elsewhere: the pages work without a network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

FETCHED = re.compile(
    r"""<(?:script|link|img|iframe|source|video|audio)\b[^>]*?\s(?:src|href|srcset)\s*=\s*["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|(?:url\(\s*|@import\s+)["']?((?:https?:)?//[^"'\s)]+)""",
    re.IGNORECASE,
)


def fetched(page: str) -> list[str]:
    """Return the addresses of other hosts that a browser fetches to show a page or style sheet; links are none."""
    return [first or second for first, second in FETCHED.findall(page)]


def check(app: Sphinx, error: Exception | None) -> None:
    pages = [path for path in Path(app.outdir).rglob("*") if path.suffix in (".html", ".css")]
    found = {path.name: fetched(path.read_text()) for path in pages}
    found = {name: addresses for name, addresses in found.items() if addresses}
    if error is None and found:
        raise RuntimeError(f"these pages need a network: {found}; ship what they fetch in docs/_static")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("build-finished", check)
    return {"parallel_read_safe": True}
