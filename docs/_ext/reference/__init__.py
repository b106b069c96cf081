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
    folder = Path(app.srcdir) / "reference" / "generated"
    commands.write_pages(folder / "commands")
    components.write_pages(folder / "configuration")
    python_api.write_page(folder / "python.md")
    shipped.write_page(folder / "experiments.md", Path(app.srcdir).parent / "experiments")


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
