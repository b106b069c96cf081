"""Objects to `{class_path, init_args}` and back: what checkpoints and manifests hold instead of pickles.

A component is any class that keeps each argument of its `__init__` under an attribute of the same name. Then its
configuration can be read from the object itself, whether LightningCLI or a script made it.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from imagen_lightning.types import InputError

OWN_PACKAGE = "imagen_lightning"
_MOST_WORDS = 120  # characters
# Where a description may find this package's own classes: parts of a model, none of which runs anything when made.
OWN_MODULES = tuple(f"{OWN_PACKAGE}.{name}" for name in ("diffusion", "networks", "samplers", "stages", "text"))
OWN_PREFIXES = tuple(f"{module}." for module in OWN_MODULES)
LARGEST = 2**63  # of whole numbers
LONGEST = 80  # characters of a value in a message

_LEVEL = Annotated[float, "an end of an interval, which may be infinite"]
_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number of at most 63 bits",
    float: "a finite number",
    _LEVEL: "a number",
    str: "text",
    Path: "text",
    NoneType: "null",
    None: "null",
    Any: "any plain data",
}
_PLAIN = {*_WORDS, list, tuple, dict, object}


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
    """Return the class that `path` names; only a module that may be named is imported.

    Args:
        path: "imagen_lightning.samplers.DDIM". Of this package, a class that one of `OWN_MODULES` exports, by any of
            its modules; of a trusted package, any class.
        trust: other packages whose classes may be named.

    Raises:
        InputError: any other path, or no such class.
    """
    if not isinstance(path, str):
        raise InputError(f"class_path {short(path)} must be text, e.g. {OWN_PACKAGE}.samplers.DDIM")
    module_name, _, name = path.rpartition(".")
    package = path.split(".")[0]
    if package == "callbacks":
        raise InputError(f"class {path!r}: write imagen_lightning.{path}; `callbacks` alone would make a second class")
    if package not in {OWN_PACKAGE, *trust}:
        raise InputError(
            f"class {short(path)} is not part of {OWN_PACKAGE}; if you trust the package {short(package)} with "
            f"running code, pass --trust {package[:LONGEST]} (in Python, trust=[{short(package)}])"
        )
    if package not in trust and not f"{module_name}.".startswith(OWN_PREFIXES):
        raise InputError(f"class {short(path)} is not a part of a stage; use one of {', '.join(OWN_MODULES)}")
    missing = InputError(f"class {short(path)} does not exist; check its spelling and the installed version")
    if not all(part.isidentifier() for part in path.split(".")):
        raise missing
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError):
        raise missing from None
    if not isinstance(found, type):
        raise InputError(f"{path!r} is not a class")
    # A module also shows what it imports and what only it uses.
    home = found.__module__
    exporter = importlib.import_module(".".join(home.split(".")[:2])) if home.startswith(OWN_PREFIXES) else None
    if home.split(".")[0] not in trust and getattr(exporter, found.__name__, None) is not found:
        raise InputError(f"class {path!r} is not a part of a stage; it belongs to {home}")
    return found


def build(
    description: Any, trust: Iterable[str] = (), *, kind: Any = Any, key: str = "", complete: bool = False
) -> Any:
    """Make the object that `describe` described, every value checked against the annotations of `__init__`.

    Args:
        description: plain data.
        trust: packages next to this one whose classes may be named.
        kind: annotation that the object must fit, e.g. a class.
        key: where the description lies, for messages.
        complete: refuse a description that `describe` would not write: an argument that is left out, or null where
            the object has another value. Names in a class's `undescribed` are never written; those in its
            `added_arguments`, which the class got later, may be left out. Classes of other packages are their authors'.

    Raises:
        InputError: a class that may not be named, a value of another kind, arguments that a class does not take or
            that make no object. The message names the key and the value.
    """
    return _Builder(tuple(trust), complete).value(description, kind, key)


def build_as(cls: type, arguments: Mapping[str, Any]) -> Any:
    """Make an object of a class at hand from described arguments, all of them, as `build` checks them."""
    return _Builder((), complete=True).make(cls, arguments, "")


@dataclass(frozen=True)
class _Builder:
    trust: tuple[str, ...]
    complete: bool

    def value(self, given: Any, kind: Any, key: str) -> Any:
        """Return `given`, or the objects that it describes, as the annotation has it; objects stay as they are."""
        options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        described = isinstance(given, Mapping) and "class_path" in given
        families = tuple(option for option in options if _is_family(option))
        if families and isinstance(given, families):
            return given  # made already, by a script
        if families and described:
            return self.object(given, families, key)
        for option in options:
            if not _fits(given, option):
                continue
            if isinstance(given, list | tuple):
                kinds = _item_kinds(option, len(given))
                return [self.value(item, kinds[i], f"{key}[{i}]") for i, item in enumerate(given)]
            if described:
                return self.object(given, (), key)
            if isinstance(given, Mapping):
                inner = (get_args(option) or (Any, Any))[1]
                return {name: self.value(item, inner, _joined(key, name)) for name, item in given.items()}
            return given
        allowed = " or ".join(dict.fromkeys(map(_words, options)))
        raise InputError(f"{key or 'the description'} {short(given)} must be {allowed}")

    def object(self, given: Mapping[str, Any], families: tuple[type, ...], key: str) -> Any:
        """Make an object of one of the families (any class where there are none)."""
        where = f"{key}: " if key else ""
        cls = _placed(find_class, where, given["class_path"], self.trust)
        path = given["class_path"]
        if families and not issubclass(cls, families):
            raise InputError(f"{where}class {path!r} must be {' or '.join(map(_words, families))}")
        if given.keys() - {"class_path", "init_args"}:
            raise InputError(f"{where}{short(dict(given))} must have class_path and init_args, and nothing else")
        return self.make(cls, given.get("init_args"), key)

    def make(self, cls: type, args: Any, key: str) -> Any:
        """Make an object of the class from described arguments; None stands for no arguments."""
        where, path = f"{key}: " if key else "", class_path(cls)
        args = {} if args is None else args
        if not isinstance(args, Mapping):
            raise InputError(f"{where}init_args {short(args)} of {path} must be a mapping of its arguments")
        parameters = _parameters(cls)
        open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        unknown = [name for name in args if name not in parameters and not open_ended]
        if unknown:
            raise InputError(
                f"{where}{path} takes no {short(unknown[0])}; it takes {', '.join(parameters) or 'nothing'}"
            )
        strict = self.complete and cls.__module__.startswith(OWN_PREFIXES)
        optional = {*getattr(cls, "undescribed", ()), *getattr(cls, "added_arguments", ())}
        for name, parameter in parameters.items():
            needed = parameter.default is parameter.empty or (strict and name not in optional)
            if name not in args and needed and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                raise InputError(f"{where}{path} lacks its argument {name!r}; it is always written: add it")
        hints = _hints(cls)
        values = {name: self.value(item, hints.get(name, Any), _joined(key, name)) for name, item in args.items()}
        try:
            made = cls(**values)
        except InputError as error:
            raise InputError(f"{where}{error}") from error.__cause__
        except Exception as error:  # a class that is given what it does not expect can end in any way
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise InputError(f"{where}{path} cannot be made of its arguments: {reason}") from error
        for name, value in values.items() if strict else ():
            if value is None and getattr(made, name, None) is not None:
                raise InputError(f"{_joined(key, name)} is null, which {path} never has; write what it is to be")
        return made


def _placed(function: Callable[..., Any], where: str, *arguments: Any) -> Any:
    """Call the function; an InputError that it raises says where."""
    try:
        return function(*arguments)
    except InputError as error:
        raise InputError(f"{where}{error}") from None


def _joined(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


@cache
def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Return the arguments of the class's `__init__`, without self."""
    if cls.__init__ is object.__init__:  # type: ignore[misc]
        return {}
    return dict(list(inspect.signature(cls.__init__).parameters.items())[1:])  # type: ignore[misc]


@cache
def _hints(cls: type) -> dict[str, Any]:
    """Return the annotations of the class's `__init__`; none of a foreign class whose names cannot be resolved."""
    try:
        return get_type_hints(cls.__init__)  # type: ignore[misc]
    except (NameError, TypeError):
        return {}


def _is_family(kind: Any) -> bool:
    """Return whether values of this kind are objects, which plain data can only describe."""
    plain = kind in _PLAIN or get_origin(kind) is not None or getattr(kind, "_is_protocol", False)
    return isinstance(kind, type) and not plain


def _fits(value: Any, kind: Any) -> bool:
    """Return whether plain data fits an annotation, but for what it holds."""
    origin = get_origin(kind) or kind
    if origin is Literal:
        return value in get_args(kind)
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is _LEVEL:
        return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    if kind in (str, Path):
        return isinstance(value, str)
    if kind in (None, NoneType):
        return value is None
    if origin in (list, tuple, Sequence, Iterable):
        fixed = origin is tuple and get_args(kind) and get_args(kind)[-1] is not Ellipsis
        return isinstance(value, list | tuple) and (not fixed or len(value) == len(get_args(kind)))
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and "class_path" not in value and all(isinstance(name, str) for name in value)
    return not _is_family(kind)  # Any, and what plain data cannot be compared with


def _item_kinds(kind: Any, count: int) -> list[Any]:
    """Return the annotations of a list's items."""
    arguments = get_args(kind)
    if get_origin(kind) is tuple and arguments[-1] is not Ellipsis:
        return [_LEVEL if argument is float else argument for argument in arguments]
    return [arguments[0] if arguments else Any] * count


def _words(kind: Any) -> str:
    """Return what an annotation allows, for messages."""
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        return ", ".join(map(repr, arguments))
    if kind in _WORDS:
        return _WORDS[kind]
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)} items"
    if origin in (list, tuple, Sequence, Iterable):
        return "a list" + (f" (each {_words(arguments[0])})" if arguments else "")
    if origin in (dict, Mapping):
        return "a mapping" + (f" (each {_words(arguments[1])})" if arguments else "")
    return f"{{class_path, init_args}} of {'an' if kind.__name__[0] in 'AEIO' else 'a'} {kind.__name__}"


def short(value: object) -> str:
    """Return a value as messages show it."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
