"""The documentation as a site: `make docs` builds it into docs/_build/html, offline, warnings as errors."""

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

import pysal

ROOT = Path(__file__).resolve().parents[1]

project = "pysal"
author = "The pysal authors"
copyright = "The pysal authors, Apache-2.0"
version = release = pysal.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click", "sphinx_copybutton"]
exclude_patterns = ["_build"]
default_role = "py:obj"  # docstrings mark names by single backticks: those with a page become links
nitpicky = True  # a reference that leads nowhere is a warning, and `make docs` makes warnings errors
nitpick_ignore_regex = [("py:.*", r".*")]  # but for types in signatures: torch's inventory would have to be downloaded

myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_inherit_docstrings = False  # captum is installed where this is built, and its sentences are its own
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Source", "Deviations", "Layout"]

highlight_language = "none"  # of blocks that name none: listings
html_theme = "furo"
html_title = f"pysal {version}"
html_static_path = ["_static"]
html_css_files = ["pysal.css"]
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Files of the repository that are pages of the site, too; the page itself holds one line.
ELSEWHERE = {
    "README.md": "index",
    "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "contributing",
    "benchmarks/README.md": "benchmarks",
    "csrc/README.md": "csrc",
}
LINK = re.compile(r"(?<!!)\[((?:[^][]|\[[^]]*\])*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def read_page(_app: Sphinx, docname: str, content: list[str]) -> None:
    """Bring in the page's text where it lives elsewhere, and make links that leave docs/ lead to pages of the site."""
    origin = next((file for file, page in ELSEWHERE.items() if page == docname != "index"), "")
    if origin:
        content[0] = (ROOT / origin).read_text()
    folder = posixpath.dirname(origin or f"docs/{docname}")

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], posixpath.normpath(posixpath.join(folder, match[2])), match[3] or ""
        if target in ELSEWHERE:
            target = f"docs/{ELSEWHERE[target]}.md"
        if target.startswith("docs/"):
            return f"[{text}]({posixpath.relpath(target, posixpath.dirname(f'docs/{docname}'))}{anchor})"
        # source code and licences have no page: their name stays, and a name of nothing stays a link, which fails the build
        return text if (ROOT / target).exists() else match[0]

    content[0] = LINK.sub(link, content[0])


def inline_math(self: Any, node: nodes.math) -> None:
    """Write a formula in the text as MathML, which browsers show without a script."""
    self.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def block_math(self: Any, node: nodes.math_block) -> None:
    """Write a formula on a line of its own as MathML; one that cannot be read stops the build."""
    self.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def escape_bars(_app: Sphinx, _what: str, _name: str, _object: object, _options: Any, lines: list[str]) -> None:
    """Keep |map| a magnitude: reStructuredText would look for a substitution of that name."""
    lines[:] = [re.sub(r"(?<!\\)\|", r"\\|", line) for line in lines]


def describe_data(_app: Sphinx, what: str, name: str, value: object, _options: Any, lines: list[str]) -> None:
    """Give a constant the words below its assignment: Python has only those of its type, and Sphinx looks in one module."""
    own = name.rpartition(".")[2]
    if what != "data" or hasattr(value, "__wrapped__"):  # a cached function has its own
        return
    for module in [module for key, module in sorted(sys.modules.items()) if key.partition(".")[0] == "pysal"]:
        if getattr(module, own, None) is value:
            words = ModuleAnalyzer.for_module(module.__name__).find_attr_docs().get(("", own))
            if words:
                lines[:] = words
                return
    raise ValueError(f"{name} has no words below its assignment")


def setup(app: Sphinx) -> None:
    """Make known what this site does its own way."""
    app.connect("source-read", read_page)
    app.connect("autodoc-process-docstring", describe_data)
    app.connect("autodoc-process-docstring", escape_bars)
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
