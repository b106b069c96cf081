"""Captions as the web has them, to captions as a text encoder should read them."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable

_TAG = re.compile(r"<!--.*?-->|<(script|style)\b.*?</\1\s*>|</?[a-z][^<>]*>", re.IGNORECASE | re.DOTALL)
_URL = re.compile(r"\b(?:[a-z][a-z0-9+.-]*://|www\.)\S*[^\s.,;:!?)\]}\"'>]", re.IGNORECASE)
_EMAIL = re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b")
_DOMAIN = re.compile(
    r"\b(?:[a-z0-9-]+\.)+(?:com|net|org|edu|gov|info|biz|io|ru|de|fr|co(?:\.[a-z]{2})?)\b(?:/\S*)?", re.IGNORECASE
)
_HANDLE = re.compile(r"(?<![\w@])@\w+")
_FILE = re.compile(
    r"\b[\w%+~-][\w.%+~-]*\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|heic|avif|psd|pdf|mp4|mov|avi|webm|html?|php|aspx?)\b",
    re.IGNORECASE,
)
_EMPTY_BRACKETS = re.compile(r"\(\s*\)|\[\s*\]|\{\s*\}")
_SPACE_BEFORE_MARK = re.compile(r"\s+([,.;:!?](?:\s|$))")
_JOINERS = "\u200c\u200d"  # part of Persian and Indic spelling and of composed emoji


def clean_caption(text: str, keep: Callable[[str], bool] | None = None) -> str:
    """Removes what is no description: HTML, URLs, e-mail addresses, @handles, file names, control characters.

    HTML entities are unescaped, whatever was removed leaves a space, whitespace is collapsed, and separators left
    hanging at either end go. Case, accents, punctuation inside and emoji stay. The result may be empty.

    Args:
        text: the caption.
        keep: of what looks like an HTML tag, whether it stays.
    """
    for _ in range(3):  # crawled captions come escaped up to three times
        text = html.unescape(text)
    text = "".join(_printable(char) for char in text)
    text = _TAG.sub(lambda tag: tag[0] if keep is not None and keep(tag[0]) else " ", text)
    for pattern in (_URL, _EMAIL, _DOMAIN, _HANDLE, _FILE, _EMPTY_BRACKETS):
        text = pattern.sub(" ", text)
    text = _SPACE_BEFORE_MARK.sub(r"\1", text)
    return " ".join(text.split()).strip(" -_|/\\,;:")


def _printable(char: str) -> str:
    category = unicodedata.category(char)
    if category in ("Cc", "Cs", "Co", "Cn"):
        return " "
    return "" if category == "Cf" and char not in _JOINERS else char
