"""The page of the experiments that ship, and links to it instead of to their files."""

from __future__ import annotations

import re
from pathlib import Path

from .markdown import code

FILES = re.compile(r"\]\((?:\.\./)+experiments/([\w./-]*)\)")


def anchor(name: str) -> str:
    return re.sub(r"\W", "-", f"experiments-{name.removesuffix('.yaml').strip('/')}")


def page(experiments: Path) -> str:
    lines = ["# Experiments\n", "The files that ship. `--config` finds each by its path, from any folder."]
    lines.append("The head of a file says its command, hardware, duration and result.\n")
    for folder in sorted({file.parent for file in experiments.rglob("*.yaml")}):
        name = folder.relative_to(experiments).as_posix()
        lines += [f"({anchor(name)})=", f"## experiments/{name}\n"]
        for file in sorted(folder.glob("*.yaml")):
            name = file.relative_to(experiments).as_posix()
            lines += [f"({anchor(name)})=", f"### {code(file.name)}\n"]
            lines += ["```yaml", file.read_text().rstrip(), "```\n"]
    return "\n".join(lines)


def lead_there(text: str) -> str:
    """Replace links to files of `experiments/` by links to their places on the page."""
    return FILES.sub(lambda found: f"](#{anchor(found[1])})", text)
