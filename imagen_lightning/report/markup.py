"""HTML from small functions: whatever is not `Html` already is escaped, so that no name or caption becomes markup."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

_VOID = frozenset({"br", "col", "img", "input", "meta"})


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def join(*parts: Any, between: str = "") -> Html:
    """The parts as one piece of HTML; what is no `Html` is escaped, None is left out."""
    found = (part if isinstance(part, Html) else html.escape(str(part)) for part in parts if part is not None)
    return Html(html.escape(between).join(found))


def element(name: str, /, *children: Any, **attributes: Any) -> Html:
    """One element with its children.

    Attributes that are None or False are left out, True has no value; `class_` and `for_` lose their underscore, and
    other underscores become hyphens (`data_value`, `aria_sort`).
    """
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    opening = Html(f"<{name}{given}>")
    return opening if name in _VOID else Html(f"{opening}{join(*children)}</{name}>")


def embedded_json(identity: str, content: Any) -> Html:
    """A block of data for the page's scripts, which no browser executes; numbers that JSON lacks become null.

    "<" is written as an escape: no text in the data can end the block.
    """
    text = content if isinstance(content, str) else json.dumps(_finite(content), ensure_ascii=False, allow_nan=False)
    safe = Html(text.replace("<", "\\u003c"))
    return element("script", safe, type="application/json", id=identity)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        return value
    return [_finite(item) for item in value]


def number(value: float | None, digits: int = 4) -> str:
    """A number for people: "12.34", "8,000", "1.2e-05", "∞"; "–" where there is none."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.{digits}g}"


def measured(value: float, digits: int = 4) -> str:
    """A measured number for people, with its zeros: "0.9200", "12.30", "12,345"."""
    if not math.isfinite(value) or 0 < abs(value) < 1e-4:
        return number(value, digits)
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}"
