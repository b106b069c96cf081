"""Configuration of Sphinx; `make docs` builds the pages into build/docs, without a network."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

project = "imagen-lightning"
author = "the authors of imagen-lightning"
release = re.search(r'^__version__ = "([^"]+)"', (ROOT / "imagen_lightning/__init__.py").read_text(), re.M)[1]
extensions = [
    "myst_nb",
    "offline",
    "reference",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_ext"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
myst_disable_syntax = ["html_inline", "html_block"]  # <zib> is a word
nb_execution_mode = "off"
nb_ipywidgets_js = {}  # of a content delivery network

napoleon_use_ivar = True
default_role = "code"  # docstrings have Markdown's `code`
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88

smartquotes = False

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_title = "imagen-lightning"
html_show_copyright = False
html_copy_source = False
html_show_sphinx = False
