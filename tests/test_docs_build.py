"""The docs' site: every page has its place, the generated reference is complete, nothing is fetched from elsewhere.

`make docs` builds the site itself, with warnings as errors.
"""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
GENERATED = "reference/generated/"
sys.path.insert(0, str(DOCS / "_ext"))

import offline  # noqa: E402
from reference import commands, components, markdown, shipped  # noqa: E402

PAGES = {page.relative_to(DOCS).as_posix().removesuffix(".md"): page for page in sorted(DOCS.rglob("*.md"))}
PAGES = {name: page for name, page in PAGES.items() if not name.startswith(GENERATED)}
START = [name for name in PAGES if name.startswith("start/")]


def test_every_page_is_in_the_contents():
    trees = re.findall(r"^```{toctree}\n(.*?)^```", PAGES["index"].read_text(), re.M | re.S)
    listed = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    assert len(listed) == len({*listed})
    assert {name for name in listed if not name.startswith(GENERATED)} == PAGES.keys() - {"index"}
    linked = set(re.findall(r"\]\(([\w/-]+)\.md\)", PAGES["index"].read_text()))
    assert linked >= {*listed}  # the front page leads to each


def test_start_pages_are_short():
    assert len(START) == 6
    for name in {*START} - {"start/quickstart"}:
        assert len(PAGES[name].read_text().splitlines()) <= 120, name


def test_the_glossary_has_the_terms():
    body = re.search(r"^:::{glossary}\n(.*?)^:::", PAGES["explanation/glossary"].read_text(), re.M | re.S)[1]
    terms = re.findall(r"^(\S.*)\n  \S", body, re.M)
    assert len(terms) >= 40
    assert {*re.findall(r"{term}`([^`]+)`", body)} <= {*terms}


@pytest.mark.parametrize("page", components.PAGES)
def test_docstrings_say_what_every_option_means(page, caplog):
    """And the page names each class with each of its options."""
    body = components.pages()[f"{page}.md"]
    assert [record.getMessage() for record in caplog.records] == []
    found = dict(components.components(components.PAGES[page][1]))
    assert found
    for name, component in found.items():
        section = re.search(rf"^## {name}\n.*?(?=^## |\Z)", body, re.M | re.S)[0]
        for option in components.options(component):
            assert f"| `{option}` |" in section, name


def test_a_missing_meaning_is_a_warning(caplog):
    class Untold:
        """Has an option.

        Args:
            told: what it is.
        """

        def __init__(self, told: int, untold: int = 1) -> None: ...

    body = components.section("mine", "Untold", Untold, {})
    assert "| `told` | `int` | required | what it is. |" in body
    (warning,) = caplog.records
    assert warning.getMessage() == "mine.Untold: its docstring does not say what untold means"


@pytest.mark.parametrize("words", [("sample",), ("evaluate",), ("shards", "write"), ("sweep",)], ids=" ".join)
def test_pages_of_commands_have_every_option(words):
    parser = commands.parser_of(words)
    body = commands.page(words, "generate images", parser)
    options = {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}
    assert options
    assert all(re.search(rf"`{option}[ `]", body) for option in options)


def test_links_to_experiments_lead_to_their_place():
    body = shipped.page(ROOT / "experiments")
    led = [shipped.lead_there(page.read_text()) for page in PAGES.values()]
    anchors = {anchor for text in led for anchor in re.findall(r"\]\(#(experiments-[\w-]+)\)", text)}
    assert len(anchors) > 5
    assert all(f"({anchor})=" in body for anchor in anchors)


def test_markdown_shows_text_as_it_is():
    assert markdown.text("a <zib> *is* x_0,\n`a_b <c>` [1]") == r"a \<zib\> \*is\* x\_0, `a_b <c>` \[1\]"


@pytest.mark.parametrize(
    "page",
    [
        '<script defer src="https://cdn.example/a.js"></script>',
        "<link rel=stylesheet href=//fonts.example/css>",
        "<img alt='x' src='http://example.org/a.png'>",
        "@font-face { src: url('https://fonts.example/a.woff2') }",
        "@import 'https://example.org/a.css';",
    ],
)
def test_what_a_page_fetches_from_elsewhere_is_found(page):
    assert len(offline.fetched(page)) == 1


def test_links_and_own_files_are_not_fetched_from_elsewhere():
    own = '<a href="https://arxiv.org/abs/2205.11487">x</a><script src="_static/a.js"></script><img src="a.png">'
    assert offline.fetched(own + "<style>a { background: url(data:image/png;base64,AA//BB) }</style>") == []


def test_the_build_ends_where_a_page_needs_a_network(tmp_path):
    app = SimpleNamespace(outdir=tmp_path)
    (tmp_path / "own.html").write_text('<script src="_static/a.js"></script>')
    offline.check(app, None)
    (tmp_path / "style.css").write_text("@import url(https://fonts.example/css);")
    with pytest.raises(RuntimeError, match=r"style\.css.*fonts\.example"):
        offline.check(app, None)
