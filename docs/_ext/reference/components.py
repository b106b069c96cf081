"""Pages of the classes that a YAML names, from their signatures and docstrings."""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from docstring_parser import DocstringStyle, parse

from .markdown import code, table, text, toctree

log = logging.getLogger("sphinx.reference")  # a warning there is an error of `make docs`

# Page: title, package. A page shows what `__all__` of the package names.
PAGES = {
    "stages": ("Stages and their settings", "imagen_lightning.stages"),
    "networks": ("Networks", "imagen_lightning.networks"),
    "diffusion": ("Diffusion", "imagen_lightning.diffusion"),
    "samplers": ("Samplers and spacings", "imagen_lightning.samplers"),
    "text": ("Text", "imagen_lightning.text"),
    "data": ("Data", "imagen_lightning.data"),
    "callbacks": ("Callbacks", "imagen_lightning.callbacks"),
    "features": ("Image features", "imagen_lightning.metrics.features"),
    "finetuning": ("Stages of a cascade", "imagen_lightning.finetuning"),
}
NOT_CONFIGURED = {  # of the Python API instead
    "DiffusionMixin",
    "DiffusionProcess",
    "FeatureExtractor",
    "Parametrization",
    "StepRecord",
    "Thresholding",
    "clean_caption",
    "masked_mean",
}


def components(package: str) -> Iterator[tuple[str, Any]]:
    """Yield name and object of what a YAML may name: classes to make, and functions that make one."""
    module = import_module(package)
    for name in module.__all__:
        found = getattr(module, name)
        made = inspect.isclass(found) and not inspect.isabstract(found) and not issubclass(found, Exception)
        if (made or package.endswith("finetuning")) and name not in NOT_CONFIGURED:
            yield name, found


def options(component: Any) -> dict[str, inspect.Parameter]:
    """Return the arguments by name, with a parent's where `**options` hands them on."""
    found: dict[str, inspect.Parameter] = {}
    parents = inspect.getmro(component)[1:] if inspect.isclass(component) else ()
    for source in [component, *(cls for cls in parents if "__init__" in vars(cls))]:
        arguments = inspect.signature(source).parameters
        found = {**{name: item for name, item in arguments.items() if item.kind is not item.VAR_KEYWORD}, **found}
        if all(item.kind is not item.VAR_KEYWORD for item in arguments.values()):
            break
    return found


def meanings(component: Any) -> dict[str, str]:
    """Return what the docstrings say of each argument; those of a class before those of its parents."""
    found: dict[str, str] = {}
    for source in reversed(inspect.getmro(component) if inspect.isclass(component) else [component]):
        for item in parse(source.__doc__ or "", DocstringStyle.GOOGLE).params:
            found |= {name.strip("* "): item.description or "" for name in item.arg_name.split(",")}
    return found


def default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    if callable(value) or not isinstance(value, bool | int | float | str | list | tuple | dict | None):
        return code(getattr(value, "__name__", type(value).__name__))
    return code(json.dumps(value, default=str).strip('"') or '""')


def section(package: str, name: str, component: Any, elsewhere: dict[str, Any]) -> str:
    described = parse(component.__doc__ or "", DocstringStyle.GOOGLE)
    told, rows = meanings(component), []
    siblings = [elsewhere[word] for word in re.findall(r"`(\w+)`", component.__doc__ or "") if word in elsewhere]
    for option, parameter in options(component).items():
        meaning = told.get(option)
        if meaning is None:  # "as in `LaionDataModule`"
            meaning = next((meanings(other)[option] for other in siblings if option in meanings(other)), None)
        if meaning is None:
            log.warning("%s.%s: its docstring does not say what %s means", package, name, option)
        kind = str(parameter.annotation) if isinstance(parameter.annotation, str) else parameter.annotation.__name__
        rows.append([code(option), code(kind), default(parameter.default), text(meaning or "")])
    parts = [described.short_description, *(described.long_description or "").split("\n\n")]
    directive = "class" if inspect.isclass(component) else "function"
    lines = [f"## {name}\n", f":::{{py:{directive}}} {name}\n:no-contents-entry:\n"]
    lines += [paragraph(part) for part in parts if part]
    if rows:
        lines.append(table(["option", "type", "default", "meaning"], rows))
    lines += [f"Refused: {text(item.description or '')}\n" for item in described.raises]
    return "\n".join([*lines, ":::\n"])


def paragraph(source: str) -> str:
    """Return a docstring's paragraph as Markdown: a list stays one."""
    items = re.split(r"^\s*- ", source, flags=re.MULTILINE)
    return "\n".join([text(items[0]), *(f"- {text(item)}" for item in items[1:])]) + "\n"


def pages() -> dict[str, str]:
    """Return Markdown by file name, below configuration/."""
    everything = {name: found for _, package in PAGES.values() for name, found in components(package)}
    about = "Each class that a YAML can name and each group of settings, from the source.\n\n"
    made = {"index.md": "# Configuration by class\n\n" + about + toctree(PAGES, 2)}
    for page, (title, package) in PAGES.items():
        about = (import_module(package).__doc__ or "").split("\n\n")[0]
        lines = [f"# {title}\n", paragraph(about), f":::{{py:currentmodule}} {package}\n:::\n"]
        lines.append(f"A YAML names each as `class_path: {package}.NAME` and sets its options under `init_args`.\n")
        sections = [section(package, name, found, everything) for name, found in components(package)]
        made[f"{page}.md"] = "\n".join([*lines, *sections])
    return made
