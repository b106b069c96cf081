"""The page helpers: tables, pictures, figures, and a file that is whole or absent."""

import base64
import hashlib
import re
from io import BytesIO

import plotly.graph_objects as go
import pytest
from PIL import Image

from imagen_lightning.errors import InputError
from imagen_lightning.report.markup import element
from imagen_lightning.report.page import Cell, Column, Page, bullets, details, encode, image, notice, table


def small_page():
    page = Page("<i>Title</i>", "lead & more")
    section = page.section("Numbers")
    section.add("a paragraph <b>", notice("note <b>"), bullets(["<b>"]), details("fold <b>", "inside <b>"))
    section.add(table(["Name", Column("N", "hint <b>", numeric=True)], [["<b>", 2], ["b", None]], caption="cap <b>"))
    section.figure(go.Figure(go.Bar(x=["<b>"], y=[1])), "plot <b>", "note <b>", switches=["log"])
    section.add(image(Image.new("RGB", (8, 8)), "alt <b>", "caption <b>", pixelated=True))
    page.section("Without content")
    return page


def test_texts_are_escaped_everywhere():
    html = small_page().render()
    html = html[: html.index("<script", html.index("</main>"))]
    assert html.count("&lt;b&gt;") == 15
    assert "<b>" not in html
    assert "<title>&lt;i&gt;Title&lt;/i&gt;</title>" in html
    assert "Without content" not in html


def test_only_the_page_s_own_scripts_are_allowed():
    html = small_page().render()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert policy.startswith("default-src &#x27;none&#x27;; ")
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(scripts) == 3
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"&#x27;sha256-{digest}&#x27;" in policy
    assert "unsafe-inline" not in policy.split(";")[1]


def test_plotly_is_there_once_and_only_where_it_is_needed():
    page = small_page()
    page.sections[0].figure(go.Figure(), "second")
    assert page.render().count("plotly.js v") == 1
    without = Page("t")
    without.section("s").add("x")
    assert len(without.render()) < 30_000


def test_cells_sort_by_value():
    html = table(
        ["Name", Column("N", numeric=True)],
        [["x", 1.5], ["y", Cell("many", 10**6, "hint")], ["z", float("nan")], [Cell(element("i", "w"), "w"), None]],
        caption="c",
    )
    cells = re.findall(r"<td[^>]*>", html)
    assert [re.findall(r'data-value="([^"]*)"', cell) for cell in cells] == [["1.5"], ["1000000"], [], []]
    assert html.count('aria-sort="none"') == 2
    assert '<th scope="row" data-value="w"><i>w</i></th>' in html
    with pytest.raises(ValueError, match="zip"):
        table(["a"], [["x", "y"]], caption="c")


def test_pictures_keep_their_pixels_while_small():
    noise = Image.effect_noise((48, 48), 90).convert("RGB")
    assert Image.open(BytesIO(encode(noise))).tobytes() == noise.tobytes()
    large = Image.open(BytesIO(encode(Image.effect_noise((500, 250), 90), 200)))
    assert (large.size, large.format) == ((200, 100), "WEBP")
    with pytest.raises(ValueError, match="neither PNG, JPEG nor WebP"):
        image(b"GIF89a", "x")


def test_a_page_replaces_a_page_and_nothing_else(tmp_path):
    page = small_page()
    path = tmp_path / "new" / "page.html"
    assert page.write(path) == path.stat().st_size
    page.write(path)
    assert [item.name for item in path.parent.iterdir()] == ["page.html"]
    thesis = tmp_path / "thesis.html"
    thesis.write_text("<html>years of work")
    with pytest.raises(InputError, match="is no page of imagen-lightning; choose another --out"):
        page.write(thesis)
    assert thesis.read_text() == "<html>years of work"
    with pytest.raises(InputError, match="is a folder"):
        page.write(tmp_path)
    with pytest.raises(InputError, match="cannot be written"):
        page.write(thesis / "below.html")
