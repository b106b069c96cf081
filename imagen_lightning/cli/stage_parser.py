"""The parser of `fit` and its kin, whose errors are one line: the key, what is wrong with it, what there is instead.

jsonargparse parses a class's arguments with a parser of their own, and each level of nesting wraps the message of the
one below. Here each level shortens its own and puts its key in front: `model.sampling.sampler: …`.
"""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from argparse import ArgumentParser
from collections.abc import Iterable
from typing import Any

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

# isort: split
from lightning.pytorch.cli import LightningArgumentParser

from imagen_lightning.components import OWN_PACKAGE, class_path, public_module
from imagen_lightning.errors import InputError

FEW = 12  # alternatives that are listed in full


class Parser(LightningArgumentParser):
    """Reports what does not parse as an InputError; options are written out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise InputError(_short(message, self)) from ex


def _short(message: str, parser: ArgumentParser) -> str:
    if found := re.match(r'Parser key "([^"]+)":(.*)', message, re.DOTALL):
        return _under(found[1], _problem(found[2]))
    if found := re.match(r"(?:Subcommand|Group) '([^']+)' does not accept option '([^']+)'", message):
        inner = next((a.choices[found[1]] for a in parser._actions if isinstance(a.choices, dict)), None)
        key = found[2] if inner is not None else f"{found[1]}.{found[2]}"
        return _unknown_key(key, inner if inner is not None else parser)
    if found := re.match(r"Option '([^']+)' is not accepted", message):
        return _unknown_key(found[1], parser)
    if found := re.match(r"the following arguments are required: (.*)", message):
        keys = ", ".join(key.split(".", 1)[-1] for key in found[1].split(", "))
        return f"{keys} is missing; give a YAML that has it: --config stage.yaml"
    if found := re.match(r"unrecognized arguments: (.*)", message):
        wrong = re.sub(r"[= ].*", "", found[1]).lstrip("-")
        return f"unknown arguments {found[1]}" + (_instead(wrong, _all_keys(parser), few=0) or "; --help lists all")
    return " ".join(message.split())


def _under(key: str, problem: str) -> str:
    """The problem with its key in front; the keys of an inner level follow on."""
    return f"{key}.{problem}" if re.match(r"[\w.]+: ", problem) else f"{key}: {problem}"


def _problem(text: str) -> str:
    """The one error of several that says something."""
    text, _, given = text.partition("Given value: ")
    text = re.sub(r"\s*Given value type: .*", "", text)
    named = re.findall(r"<class '([\w.]+)'>", text.partition("Subtypes:")[2].partition("Errors:")[0])
    _, is_union, errors = text.partition("Errors:\n")
    if not is_union:
        return _one_problem(" ".join(text.split()), None)
    items = [" ".join(item.split()) for item in re.split(r"^    - ", errors, flags=re.MULTILINE) if item.strip()]
    expected = [item[len("Expected a ") :] for item in items if item.startswith("Expected a ")]
    kinds = [kind for kind in expected if not kind.startswith("dot import path") and "NoneType" not in kind]
    others = [item for item in items if not item.startswith(("Expected a ", "Not a valid subclass"))]
    if others:
        return _one_problem(others[0], named[0] if named else None)
    if kinds:
        return f"expected {' or '.join(map(_kind, kinds))}, got {_value(given)}"
    choices = _subclasses(named[0]) if named else []
    return f"{_value(given)} is no class; give a class_path" + (f": {_listed(choices)}" if choices else "")


def _one_problem(text: str, base: str | None) -> str:
    if found := re.search(r"(?:class_path '|class_path='|Import path )((?:callbacks|experiments)\.[\w.]+)", text):
        return f"class {found[1]!r} would be a second class; write {OWN_PACKAGE}.{found[1]}"
    if found := re.match(r"Problem with given class_path '([^']+)': (.*)", text):
        return _unknown_class(found[1], found[2], base)
    if found := re.match(r"Type .* expects a function or a callable class: (.*)\. Got value: (.*)", text):
        path = re.search(r"class_path='([^']+)'", found[2])
        return _unknown_class(path[1] if path else found[2], found[1], base)
    if found := re.match(r"Import path (\S+) does not correspond to a subclass of (\S+)", text):
        choices = _subclasses(base) if base else []
        return f"{found[1]} is no {found[2]}" + (f"; use {_listed(choices)}" if choices else "")
    if found := re.match(r"Expected an? (.*?)\. Got value: (.*)", text):
        return f"expected {_kind(found[1])}, got {_value(found[2])}"
    return text


def _kind(kind: str) -> str:
    """`int` for "<class 'int'>", and the choices of a Literal."""
    if found := re.fullmatch(r"<class '(?:\w+\.)*(\w+)'>", kind):
        return found[1]
    found = re.fullmatch(r"typing\.Literal\[(.*)\]", kind)
    return found[1] if found else kind


def _value(text: str) -> str:
    text = text.strip()
    if found := re.fullmatch(r"NestedArg\(key='([^']+)', val='?(.*?)'?\)", text):
        return f"{found[1]}={found[2]}"
    return repr(text if len(text) <= 80 else text[:80] + "…")


def _unknown_key(key: str, parser: ArgumentParser) -> str:
    """Keys beside the unknown one, or those spelt like it where there are many."""
    taken = [action.dest for action in parser._actions if action.dest not in ("help", "config", "print_config")]
    *parents, _ = key.split(".")
    depth = len(parents) + 1
    beside = sorted({".".join(dest.split(".")[:depth]) for dest in taken if dest.split(".")[: depth - 1] == parents})
    return f"{key}: there is no such key" + _instead(key, beside)


def _unknown_class(path: str, reason: str, base: str | None) -> str:
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError):
        return f"class {path!r} does not exist ({reason}); check its spelling, or install its package"
    if hasattr(module, name):
        return f"class {path!r} cannot be used: {reason}"
    exported = {item: getattr(module, item) for item in getattr(module, "__all__", vars(module))}
    wanted = _find(base) if base else object
    classes = [item for item, cls in exported.items() if isinstance(cls, type) and issubclass(cls, wanted)]
    return f"class {path!r} does not exist" + _instead(path, [f"{module_name}.{item}" for item in sorted(classes)])


def _all_keys(parser: ArgumentParser) -> list[str]:
    inner = [
        choice for action in parser._actions if isinstance(action.choices, dict) for choice in action.choices.values()
    ]
    return sorted({action.dest for each in (parser, *inner) for action in each._actions})


def _instead(wrong: str, choices: list[str], few: int = FEW) -> str:
    """The choices whose last part is spelt like that of the wrong one, or all of a few."""
    last = {choice.rpartition(".")[2]: choice for choice in choices}
    near = difflib.get_close_matches(wrong.rpartition(".")[2], last, n=2, cutoff=0.7)
    if near:
        return f"; did you mean {_listed(last[name] for name in near)}?"
    return f"; use {_listed(choices)}" if 0 < len(choices) <= few else ""


def _listed(choices: Iterable[str]) -> str:
    return " or ".join(choices)


def _find(path: str) -> type:
    module_name, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module_name or "builtins"), name, object)
    return found if isinstance(found, type) else object


def _subclasses(base: str) -> list[str]:
    """This package's classes that may stand where `base` is asked for."""

    def below(cls: type) -> set[type]:
        children: set[type] = set(type.__subclasses__(cls))
        return children.union(*map(below, children))

    wanted = _find(base)
    if wanted is object:
        return []
    own = {cls for cls in below(wanted) if cls.__module__.startswith(f"{OWN_PACKAGE}.")}
    return sorted(class_path(cls) for cls in own if cls.__name__ in _exported(public_module(cls)))


def _exported(module: str) -> Iterable[str]:
    return getattr(sys.modules[module], "__all__", ())
