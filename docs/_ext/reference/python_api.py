"""The page of the Python API: what packages export beside the classes that a YAML names."""

from __future__ import annotations

import inspect
from importlib import import_module
from pkgutil import iter_modules

from .components import PAGES, components

PACKAGES = ["imagen_lightning.cascade", "imagen_lightning.types", "imagen_lightning.images", "imagen_lightning.metrics"]


def modules() -> list[str]:
    """Return the modules shown, the more important ones first; of metrics each module, one a kind of metric."""
    metrics = import_module("imagen_lightning.metrics")
    below = [item.name for item in iter_modules(metrics.__path__, "imagen_lightning.metrics.") if not item.ispkg]
    return [*PACKAGES, *below, *(package for _, package in PAGES.values())]


def page() -> str:
    lines = ["# Python API\n", "What scripts import. The classes that a YAML names are in"]
    lines.append("[Configuration by class](configuration/index.md); Python makes them with the same arguments.\n")
    shown = {id(found) for _, package in PAGES.values() for _, found in components(package)}
    for name in modules():
        module = import_module(name)
        entries = []
        for member in getattr(module, "__all__", None) or own(module):
            found = getattr(module, member)
            if id(found) not in shown and inspect.isclass(found):
                entries.append(f".. autoclass:: {name}.{member}\n   :members:\n")
            elif id(found) not in shown and inspect.isfunction(found):
                entries.append(f".. autofunction:: {name}.{member}\n")
            shown.add(id(found))
        if entries:
            lines += [f"## {name}\n", "```{eval-rst}", f".. py:module:: {name}\n", *entries, "```\n"]
    return "\n".join(lines)


def own(module: object) -> list[str]:
    """Return the names of what a module without `__all__` defines itself."""
    here = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    return [name for name in here if not name.startswith("_")]
