"""HTML by functions: nothing becomes markup that is not meant to be."""

import html
import json
from html.parser import HTMLParser

import pytest

from imagen_lightning.report.markup import Html, element, embedded_json, join, measured, number

EVIL = "</p><script>alert('x')</script>&\"'"


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.text += text


def test_texts_and_attributes_are_escaped():
    tags = Tags(element("p", EVIL, join("a", EVIL, between="<"), title=EVIL, class_="x", data_value=1.5, hidden=True))
    assert tags.found == [("p", {"title": EVIL, "class": "x", "data-value": "1.5", "hidden": None})]
    assert tags.text == f"{EVIL}a<{EVIL}"


def test_html_is_kept_and_absent_parts_are_left_out():
    assert element("p", element("b", "x"), None, hidden=False, id=None) == "<p><b>x</b></p>"
    assert element("meta", name="a", content="b") == '<meta name="a" content="b">'
    assert isinstance(join("a", Html("<b>")), Html)
    assert join("<", Html("<b>")) == "&lt;<b>"


@pytest.mark.parametrize("content", [EVIL, ["<!--", "<script>", "</script>"], {"a": [1, 2.5, None, True]}])
def test_embedded_json_cannot_end_its_block(content):
    block = embedded_json("x", content if not isinstance(content, str) else [content])
    inner = block.removeprefix('<script type="application/json" id="x">').removesuffix("</script>")
    assert "<" not in inner
    assert json.loads(inner) == (content if not isinstance(content, str) else [content])


def test_embedded_json_has_no_numbers_that_json_lacks():
    inner = embedded_json("x", {"a": [float("nan"), float("inf"), 1.0]})
    assert "[null, null, 1.0]" in html.unescape(inner)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (float("nan"), "–"), (float("-inf"), "-∞"), (8000, "8,000"), (0.5, "0.5"), (1.23456e-5, "1.235e-05")],
)
def test_number(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.9, "0.9000"), (24, "24.00"), (12345.6, "12,346"), (0.0, "0.000"), (2e-5, "2e-05"), (float("inf"), "∞")],
)
def test_measured_numbers_keep_their_zeros(value, text):
    assert measured(value) == text
