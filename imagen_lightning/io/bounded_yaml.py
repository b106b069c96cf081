"""Read YAML from others: plain data only, and of a size that is known before anything is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import CollectionNode, MappingNode, Node

from imagen_lightning.errors import InputError
from imagen_lightning.files import read_text

MAX_BYTES = 2**20
MAX_DEPTH = 64
MAX_VALUES = 100_000
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same data, five times as fast


def read_yaml(path: Path, what: str) -> Any:
    """Return what a YAML file holds; see `load_yaml`.

    Raises:
        InputError: it cannot be read, is damaged or too large.
    """
    return load_yaml(read_text(path, what, MAX_BYTES), f"{what} {str(path)!r}")


def load_yaml(text: str, name: str) -> Any:
    """Return the plain data of a YAML document.

    A few lines of aliases to aliases stand for billions of values: values are counted as if each alias were written
    out, before they are made.

    Args:
        text: the document.
        name: of it, for messages.

    Raises:
        InputError: it is not valid, or has more than MAX_DEPTH levels or MAX_VALUES values.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        count, _ = _size(node, {}, name)
        if count > MAX_VALUES:
            raise InputError(f"{name} stands for {count:,} values, aliases written out; at most {MAX_VALUES:,} are")
        return loader.construct_document(node)
    except RecursionError:
        raise InputError(f"{name} has more than {MAX_DEPTH} levels; nest it less deeply") from None
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, TypeError) as error:  # the last two for dates and numbers that are none
        raise InputError(f"{name} is not valid YAML: {error}") from None
    finally:
        loader.dispose()


def _size(node: Node, known: dict[int, tuple[int, int] | None], name: str) -> tuple[int, int]:
    """(values, levels) of a node with each alias written out."""
    if not isinstance(node, CollectionNode):
        return 1, 1
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise InputError(f"{name} has an alias to a list or mapping that holds it; write it out")
        return found
    known[id(node)] = None
    children = [item for pair in node.value for item in pair] if isinstance(node, MappingNode) else node.value
    sizes = [_size(child, known, name) for child in children]
    depth = 1 + max((levels for _, levels in sizes), default=0)
    if depth > MAX_DEPTH:
        raise InputError(f"{name} has more than {MAX_DEPTH} levels; nest it less deeply")
    known[id(node)] = found = 1 + sum(count for count, _ in sizes), depth
    return found
