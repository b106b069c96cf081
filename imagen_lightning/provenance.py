"""Where results come from: the program's and its libraries' versions, and the revision of the working folder."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

from imagen_lightning import __version__


def versions() -> dict[str, str]:
    """Package name to version, of what decides a run's numbers."""
    packages = {package: version(package) for package in ("torch", "lightning")}
    return {"imagen-lightning": __version__, **packages, "python": sys.version.split()[0]}


def git_revision() -> str | None:
    """The commit of the working folder, followed by "-dirty" where files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
