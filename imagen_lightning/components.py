"""Objects to `{class_path, init_args}` and back: what checkpoints and manifests hold instead of pickles.

A component is any class that keeps each argument of its `__init__` under an attribute of the same name. Then its
configuration can be read from the object itself, whether LightningCLI or a script made it.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from imagen_lightning.types import InputError

OWN_PACKAGE = "imagen_lightning"
_MOST_WORDS = 120  # characters
# Where a description may find this package's own classes: parts of a model, none of which runs anything when made.
OWN_MODULES = tuple(f"{OWN_PACKAGE}.{name}" for name in ("diffusion", "networks", "samplers", "stages", "text"))


def class_path(value: object) -> str:
    cls = value if isinstance(value, type) else type(value)
    return f"{public_module(cls)}.{cls.__qualname__}"


def public_module(cls: type) -> str:
    """The shortest package that exports the class: `imagen_lightning.samplers` for `imagen_lightning.samplers.ddim`."""
    parts = cls.__module__.split(".")
    for length in range(1, len(parts)):
        module = importlib.import_module(".".join(parts[:length]))
        if module.__dict__.get(cls.__name__) is cls:
            return ".".join(parts[:length])
    return cls.__module__


def describe(value: Any) -> Any:
    """Returns plain data (dicts, lists, numbers, strings) from which `build` makes an equal object.

    Raises:
        InputError: an object does not keep an argument of its `__init__` under the same name.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    return {"class_path": class_path(value), "init_args": describe_args(value)}


def in_words(description: Any) -> str:
    """Return what `describe` gave, in words for people: "DDIM(eta=0)"; own classes without their module.

    Descriptions that differ have words that differ: long ones are cut, and end with a hash of all.
    """
    text = _in_words(description)
    if len(text) <= _MOST_WORDS:
        return text
    return f"{text[:_MOST_WORDS]}… ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        if "class_path" not in value:
            return f"{{{', '.join(f'{key}: {_in_words(item)}' for key, item in value.items())}}}"
        path = str(value["class_path"])
        name = value.get("name") or (path.rpartition(".")[2] if path.startswith(f"{OWN_PACKAGE}.") else path)
        inner = ", ".join(f"{key}={_in_words(item)}" for key, item in (value.get("init_args") or {}).items())
        return f"{name}({inner})" if inner else str(name)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_in_words, value))}]"
    if value is None:
        return "none"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def describe_args(value: object, skip: Iterable[str] = ()) -> dict[str, Any]:
    """The arguments of `value`'s `__init__` as plain data, without the names in `skip`."""
    if type(value).__init__ is object.__init__:
        return {}
    arguments = {}
    for name, parameter in inspect.signature(type(value).__init__).parameters.items():
        if name == "self" or name in skip:
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or not hasattr(value, name):
            raise InputError(
                f"{class_path(value)} cannot be saved: it does not keep its argument {name!r} as an attribute of the "
                f"same name; add `self.{name} = {name}` to its __init__"
            )
        arguments[name] = describe(getattr(value, name))
    return arguments


def find_class(path: str, trust: Iterable[str] = ()) -> type:
    """Imports the class named by `path` if its package is this one or trusted by name.

    Raises:
        InputError: a foreign package, or no such class.
    """
    package = path.split(".")[0]
    if package == "callbacks":
        raise InputError(f"class {path!r}: write imagen_lightning.{path}; `callbacks` alone would make a second class")
    if package not in {OWN_PACKAGE, *trust}:
        raise InputError(
            f"class {path!r} is not part of {OWN_PACKAGE}; if you trust the package {package!r} with running code, "
            f"pass --trust {package} (in Python, trust=[{package!r}])"
        )
    module_name, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError):
        raise InputError(f"class {path!r} does not exist; check its spelling and the installed version") from None
    if not isinstance(found, type):
        raise InputError(f"{path!r} is not a class")
    # A module also shows what it imports; the class must be at home in a package that may be named.
    home = found.__module__
    if home.split(".")[0] not in trust and not home.startswith(OWN_MODULES):
        raise InputError(f"class {path!r} is no part of a stage; it belongs to {home}")
    return found


def build(description: Any, trust: Iterable[str] = ()) -> Any:
    """Makes the object that `describe` described; only classes of this package and of trusted packages are imported."""
    trust = tuple(trust)
    if isinstance(description, Mapping):
        if "class_path" in description:
            cls = find_class(description["class_path"], trust)
            arguments = {key: build(item, trust) for key, item in (description.get("init_args") or {}).items()}
            try:
                return cls(**arguments)
            except TypeError as error:
                raise InputError(f"{description['class_path']}: {error}") from error
        return {key: build(item, trust) for key, item in description.items()}
    if isinstance(description, list | tuple):
        return [build(item, trust) for item in description]
    return description
