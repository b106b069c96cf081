"""Write the reference from the package: commands, configuration, Python API, experiments.

`make docs` makes these pages; they are not committed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import commands, components, python_api, shipped

if TYPE_CHECKING:
    from sphinx.application import Sphinx

MODULES = re.compile(r"\]\((?:\.\./)+imagen_lightning/([\w/]+)\.py\)")


def write_all(app: Sphinx) -> None:
    """Write pages that changed, since Sphinx reads those anew, and delete those of what is no more."""
    folder = Path(app.srcdir) / "reference" / "generated"
    pages = {folder / "python.md": python_api.page()}
    pages[folder / "experiments.md"] = shipped.page(Path(app.srcdir).parent / "experiments")
    pages |= {folder / "commands" / name: page for name, page in commands.pages().items()}
    pages |= {folder / "configuration" / name: page for name, page in components.pages().items()}
    for path in {*folder.rglob("*.md")} - {*pages}:
        path.unlink()
    for path, page in pages.items():
        if not path.exists() or path.read_text() != page:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(page)


def lead_inside(app: Sphinx, name: str, source: list[str]) -> None:
    """Links to the repository's files lead to their pages here."""
    source[0] = MODULES.sub(lambda found: f"](#imagen_lightning.{found[1].replace('/', '.')})", source[0])
    source[0] = shipped.lead_there(source[0])


def keep_colons(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Napoleon takes what stands before a colon in a property's first line for its type."""
    if what == "property":
        lines.insert(0, "")


def setup(app: Sphinx) -> dict[str, Any]:
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("builder-inited", write_all)
    app.connect("source-read", lead_inside)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)
    return {"parallel_read_safe": True}
