"""Read YAML from users: plain data only, of bounded size and depth, with each key once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from imagen_lightning.errors import InputError

MAX_BYTES = 2**22
MAX_DEPTH = 50
MAX_NODES = 200_000  # with each alias counted as often as it is used

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# PyYAML raises the last three where an explicit tag does not fit its text: `!!int`, `!!bool perhaps`, `!!timestamp x`.
_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError)


def read_yaml(text: str, what: str) -> Any:
    """Return what YAML's safe types say.

    Args:
        text: one YAML document.
        what: the file, for messages: "sweep file 'a.yaml'".

    Raises:
        InputError: it is not valid YAML, too long, nested too deeply, or aliases make it too large; a key stands twice
            in one mapping, or a collection holds itself.
    """
    size = len(text.encode("utf-8", errors="replace"))
    if size > MAX_BYTES:
        raise InputError(f"{what} has {size:,} bytes; at most {MAX_BYTES:,} are read")
    try:
        _check_structure(text)
        return yaml.load(text, Loader=_Loader)
    except InputError as error:
        raise InputError(f"{what} {error}") from None
    except _ERRORS as error:
        raise InputError(f"{what} is not valid YAML: {' '.join(str(error).split())}") from None


@dataclass
class _Collection:
    """A mapping or sequence that is being read."""

    anchor: str | None
    is_mapping: bool
    nodes: int = 1
    children: int = 0
    keys: set[tuple[str, str]] = field(default_factory=set)


def _check_structure(text: str) -> None:
    """Read the events alone, which no alias multiplies and no nesting recurses in."""
    sizes: dict[str, int] = {}  # of anchored nodes, expanded
    stack: list[_Collection] = []
    for event in _events(text):
        if isinstance(event, yaml.CollectionStartEvent):
            stack.append(_Collection(event.anchor, isinstance(event, yaml.MappingStartEvent)))
            if len(stack) > MAX_DEPTH:
                raise InputError(f"is nested deeper than {MAX_DEPTH} levels (line {event.start_mark.line + 1})")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            done = stack.pop()
            nodes, anchor = done.nodes, done.anchor
        elif isinstance(event, yaml.ScalarEvent):
            nodes, anchor = 1, event.anchor
            _check_key(stack, event)
        elif isinstance(event, yaml.AliasEvent):
            if any(outer.anchor == event.anchor for outer in stack):
                raise InputError(f"holds itself: *{event.anchor} in line {event.start_mark.line + 1}")
            nodes, anchor = sizes.get(event.anchor, 1), None
        else:
            continue
        if anchor is not None:
            sizes[anchor] = nodes
        if stack:
            stack[-1].nodes += nodes
            stack[-1].children += 1
            if stack[-1].nodes > MAX_NODES:
                raise InputError(f"has more than {MAX_NODES:,} values, each use of an alias counted")


def _events(text: str) -> Iterator[Any]:
    loader = _Loader(text)
    try:
        while loader.check_event():
            event = loader.get_event()
            if isinstance(event, yaml.ScalarEvent) and event.tag is None:
                event.tag = loader.resolve(yaml.ScalarNode, event.value, event.implicit)
            yield event
    finally:
        loader.dispose()


def _check_key(stack: list[_Collection], event: Any) -> None:
    if not stack or not stack[-1].is_mapping or stack[-1].children % 2 or event.tag == "tag:yaml.org,2002:merge":
        return
    key = (event.tag, event.value)
    if key in stack[-1].keys:
        raise InputError(f"has the key {event.value!r} twice in one mapping (line {event.start_mark.line + 1})")
    stack[-1].keys.add(key)
