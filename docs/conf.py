"""Sphinx settings of the site; tools/site_pages.py puts its sources together and calls Sphinx (`make docs`)."""
import re
from configparser import ConfigParser
from functools import partial
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.util import logging

settings = ConfigParser(delimiters=["="])
settings.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
settings = settings["DEFAULT"]

project, author, release = settings["title"], settings["author"], settings["version"]
copyright = settings["copyright"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_design", "sphinx_copybutton"]

# Notebooks are shown as they are kept, outputs included: nbdev_test runs them, the site does not.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist", "html_image"]
myst_dmath_double_inline = True
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]

default_role = "code"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_preprocess_types = False

html_theme = "pydata_sphinx_theme"
html_title = project
exclude_patterns = ["DATA_USE.md", "CHANGELOG.md", "MODEL_CARD.md"]
html_static_path = ["_static"]
html_css_files = ["medvis.css"]
html_show_sourcelink = False
html_copy_source = False
html_context = {"default_mode": "auto"}
html_math_renderer = "mathml"
html_theme_options = {
    "logo": {"text": project},
    "navbar_end": ["theme-switcher"],
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
copybutton_exclude = ".linenos, .gp, .go"

log = logging.getLogger(__name__)


def write_math(self, node, display):
    "MathML, which browsers draw by themselves: no script, and nothing to fetch."
    try:
        shown = convert(node.astext(), display=display)
    except Exception as error:
        log.warning("a formula that cannot be shown: %s (%r)", node.astext(), error, location=node)
        shown = self.encode(node.astext())
    self.body.append(shown if display == "inline" else f'<div class="math">{shown}</div>')
    raise SkipNode


def escape_docstring(app, what, name, thing, options, lines):
    "Docstrings are plain sentences with `code`: outside of code no character means anything to reStructuredText."
    for number, line in enumerate(lines):
        parts = line.split("`")
        parts[::2] = [re.sub(r"([*|]|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
        lines[number] = "`".join(parts)


def setup(app):
    app.connect("autodoc-process-docstring", escape_docstring, priority=400)
    inline, block = (partial(write_math, display=display) for display in ("inline", "block"))
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
