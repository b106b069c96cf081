"""One self-contained HTML page: sections of text, sortable tables, figures and pictures.

Nothing on it is fetched from elsewhere: styles, scripts, plotly.js, figures and pictures lie in the file, and a content
security policy keeps it so. Only the page's own scripts, named in that policy by their hashes, can run.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from imagen_lightning import __version__
from imagen_lightning.errors import InputError
from imagen_lightning.io.atomic import write_bytes
from imagen_lightning.report.markup import Html, element, embedded_json, join, number
from imagen_lightning.report.script import SCRIPT
from imagen_lightning.report.style import STYLE

if TYPE_CHECKING:
    import plotly.graph_objects as go

GENERATOR = "imagen-lightning"
_THEME = "try{document.documentElement.dataset.theme=localStorage.getItem('imagen-lightning-theme')||''}catch(e){}"


@dataclass(frozen=True)
class Cell:
    """A table's cell that is more than a text or a number.

    Attributes:
        content: text, or `Html`.
        value: by what the column is sorted: a number or a text; None sorts last in both directions.
        title: shown when the pointer rests on it.
    """

    content: Any
    value: float | str | None = None
    title: str | None = None


@dataclass(frozen=True)
class Column:
    """A table's column.

    Attributes:
        title: text, or `Html`.
        hint: shown when the pointer rests on the title.
        numeric: its cells are numbers, set to the right.
        sortable: whether its title sorts the table.
        before: stands before the title, and does not sort.
    """

    title: Any
    hint: str | None = None
    numeric: bool = False
    sortable: bool = True
    before: Any = ""


def table(columns: Sequence[Column | str], rows: Sequence[Sequence[Any]], *, caption: str) -> Html:
    """A table whose titles sort it; it scrolls sideways where it is wide.

    Args:
        columns: their titles.
        rows: cells: a `Cell`, a text, a number (sorted as one), or None for an empty cell.
        caption: what the table shows; said by screen readers, and shown above it.

    Raises:
        ValueError: a row has another number of cells than there are columns.
    """
    made = [item if isinstance(item, Column) else Column(item) for item in columns]
    head = element("tr", *(_title(column) for column in made))
    body = [[_cell(column, item, column is made[0]) for column, item in zip(made, row, strict=True)] for row in rows]
    inner = element(
        "table",
        element("caption", caption),
        element("thead", head),
        element("tbody", *(element("tr", *cells) for cells in body)),
        class_="sortable",
    )
    return element("div", inner, class_="scroll", role="region", aria_label=caption, tabindex=0)


def _title(column: Column) -> Html:
    css = "number" if column.numeric else None
    if not column.sortable:
        return element("th", column.before, column.title, scope="col", class_=css, title=column.hint)
    button = element("button", column.title, type="button")
    return element("th", column.before, button, scope="col", class_=css, title=column.hint, aria_sort="none")


def _cell(column: Column, item: Any, first: bool) -> Html:
    if item is None:
        item = Cell("–")
    elif isinstance(item, float | int) and not isinstance(item, bool):
        item = Cell(number(item), float(item))
    elif not isinstance(item, Cell):
        item = Cell(item, str(item))
    css = "number" if column.numeric else None
    value = item.value
    if value == "" or (isinstance(value, float) and math.isnan(value)):
        value = None
    # The row's name is its header.
    name, scope = ("th", "row") if first else ("td", None)
    return element(name, item.content, scope=scope, class_=css, data_value=value, title=item.title)


def image(
    picture: Image.Image | bytes, alt: str, caption: str | None = None, *, pixelated: bool = False, wide: bool = False
) -> Html:
    """A picture inside the page.

    Args:
        picture: a PIL image, or the bytes of a PNG, JPEG or WebP file.
        alt: what it shows, for those who do not see it.
        caption: stands under it.
        pixelated: enlarge without smoothing, for small generated images.
        wide: let it take the section's whole width.
    """
    source = data_uri(picture if isinstance(picture, bytes) else encode(picture))
    css = " ".join(word for word, wanted in (("pixelated", pixelated), ("wide", wide)) if wanted)
    shown = element("img", src=source, alt=alt, loading="lazy", class_=css or None)
    return element("figure", shown, element("figcaption", caption) if caption else None, class_="picture")


def encode(picture: Image.Image, max_side: int | None = None) -> bytes:
    """A picture as a file's bytes: PNG up to 64 px, WebP above; reduced to `max_side` pixels where it is larger."""
    side = max(picture.size)
    if max_side is not None and side > max_side:
        scale = max_side / side
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    buffer = BytesIO()
    if max(picture.size) <= 64:
        picture.convert("RGB").save(buffer, "PNG", optimize=True)
    else:
        picture.convert("RGB").save(buffer, "WEBP", quality=85, method=4)
    return buffer.getvalue()


def data_uri(content: bytes) -> str:
    """The bytes of a PNG, JPEG or WebP file as an image's source.

    Raises:
        ValueError: they are none of these.
    """
    kinds = {b"\x89PNG": "png", b"\xff\xd8\xff\xe0": "jpeg", b"\xff\xd8\xff\xe1": "jpeg", b"RIFF": "webp"}
    kind = kinds.get(content[:4])
    if kind is None:
        raise ValueError(f"a picture that begins with {content[:4]!r} is neither PNG, JPEG nor WebP")
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def notice(text: Any, kind: str = "note") -> Html:
    """A line that stands out: kind is "note", "verdict" or "problem"."""
    return element("p", text, class_=f"notice {kind}")


def bullets(items: Sequence[Any]) -> Html:
    """A list."""
    return element("ul", *(element("li", item) for item in items))


def details(summary: str, *content: Any, opened: bool = False) -> Html:
    """Content that is folded away until its summary is clicked."""
    return element("details", element("summary", summary), *content, open=opened)


class Section:
    """A titled part of a page, to which content is added in order.

    Attributes:
        identity: the anchor of links to it.
        title: its heading.
        parts: its content.
    """

    def __init__(self, page: Page, identity: str, title: str) -> None:
        self._page = page
        self.parts: list[Html] = []
        self.identity = identity
        self.title = title

    def add(self, *parts: Any) -> None:
        """Adds HTML made by this module's functions, or text (escaped) as a paragraph."""
        self.parts += [part if isinstance(part, Html) else element("p", part) for part in parts]

    def figure(self, figure: go.Figure, title: str, note: str | None = None, **options: Any) -> None:
        """Adds a plotly figure; see `Page.plot`."""
        self.parts.append(self._page.plot(figure, title, note, **options))

    def data(self, kind: str, content: Any) -> str:
        """Embeds data for a script, and returns the id of its block."""
        return self._page.embed(kind, content)

    def render(self) -> Html:
        heading = element("h2", self.title, id=f"{self.identity}-title")
        return element("section", heading, *self.parts, id=self.identity, aria_labelledby=f"{self.identity}-title")


class Page:
    """A page in the making.

    Args:
        title: of the page.
        lead: a line under it.
    """

    def __init__(self, title: str, lead: Any = None) -> None:
        self.title = title
        self.lead = lead
        self.sections: list[Section] = []
        self._data: list[Html] = []
        self._num_plots = 0

    def section(self, title: str, identity: str | None = None) -> Section:
        """Begins a section; the contents bar links to it."""
        made = Section(self, identity or f"section-{len(self.sections) + 1}", title)
        self.sections.append(made)
        return made

    def embed(self, kind: str, content: Any) -> str:
        """Embeds data for a script, and returns the id of its block."""
        identity = f"{kind}-{len(self._data) + 1}"
        self._data.append(embedded_json(identity, content))
        return identity

    def plot(
        self,
        figure: go.Figure,
        title: str,
        note: str | None = None,
        *,
        switches: Sequence[str] = (),
        off: Sequence[str] = (),
        height: int = 340,
    ) -> Html:
        """The place of a plotly figure, drawn when it comes into view, in the colours of the page's theme.

        Args:
            figure: traces may carry `meta={"run": …, "kind": …}`: the run by which a table's tick boxes hide them, and
                the kind that a switch hides.
            title: stands above it.
            note: a line under the title.
            switches: "log" for a button between a linear and a logarithmic y axis, "raw" for one that hides the traces
                of kind "raw".
            off: those of the switches that hide at first.
            height: in pixels.
        """
        self._num_plots += 1
        identity = self.embed("plot", figure.to_json())
        words = {"log": "Log axis", "raw": "Raw values"}
        pressed = {"log": figure.layout.yaxis.type == "log", "raw": "raw" not in off}
        buttons = (
            element("button", words[name], type="button", data_switch=name, aria_pressed=str(pressed[name]).lower())
            for name in switches
        )
        head = element("div", element("h3", title), element("div", *buttons, class_="switches"), class_="plot-head")
        under = element("p", note, class_="plot-note") if note else None
        style = f"height:{height}px"
        body = element("div", class_="plot", data_plot=identity, style=style, role="img", aria_label=title)
        return element("div", head, under, body, class_="plot-box")

    def render(self) -> str:
        """The page's text; sections without content are left out."""
        sections = [section for section in self.sections if section.parts]
        links = (element("a", section.title, href=f"#{section.identity}") for section in sections)
        theme = element("button", "Dark", type="button", id="theme", aria_pressed="false")
        bar = element("nav", element("div", *links, class_="links"), theme, aria_label="Contents")
        made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        lead = element("p", self.lead, class_="lead") if self.lead is not None else ""
        header = element("header", element("h1", self.title), lead)
        footer = element("footer", f"Made by imagen-lightning {__version__} on {made}.")
        main = element("main", header, *(section.render() for section in sections), footer)
        scripts = [_THEME, SCRIPT, *([_plotly()] if self._num_plots else [])]
        allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
        policy = (
            f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
            "base-uri 'none'; form-action 'none'"
        )
        early, *late = (element("script", Html(script)) for script in scripts)
        head = element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", name="generator", content=f"{GENERATOR} {__version__}"),
            element("meta", http_equiv="Content-Security-Policy", content=policy),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("title", self.title),
            early,
            element("style", Html(STYLE)),
        )
        # The page can be read before plotly.js, which is long, has been parsed.
        body = element("body", bar, main, *self._data, *late)
        return join(Html("<!doctype html>\n"), element("html", head, body, lang="en")) + "\n"

    def write(self, path: str | Path) -> int:
        """Writes the page whole or not at all, in the place of an earlier one; returns its bytes.

        Raises:
            InputError: the path is a folder, holds what no page of this package is, or cannot be written.
        """
        path = Path(path)
        refuse_other(path)
        content = self.render().encode()
        try:
            write_bytes(path, content)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}; choose another --out") from error
        return len(content)


def refuse_other(path: Path) -> None:
    """Raises InputError where something other than a page of this package lies at the path."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file such as {path / 'report.html'}")
    if not path.exists():
        return
    with path.open("rb") as file:
        if f'name="generator" content="{GENERATOR}'.encode() not in file.read(1000):
            raise InputError(f"{path} exists and is no page of imagen-lightning; choose another --out")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _digest(script: str) -> str:
    """The base64 SHA-256 by which a content security policy names a script."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
