"""The documentation site: python -m sphinx -W --keep-going -b html docs build/docs."""

import json
import re
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.util.logging import getLogger

import torch_sap

ROOT = Path(__file__).parents[1]

project = "torch_sap"
author = "the torch_sap developers"
project_copyright = author
version = release = torch_sap.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_math_renderer = "mathml"
myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 4
source_suffix = {".md": "markdown", ".ipynb": "markdown"}
html_theme = "furo"
html_title = f"torch_sap {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
exclude_patterns = ["results/**/*.md"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_use_rtype = False  # "What was found: d, I, r, c" is a sentence; only types before a colon are a type
# The pages are read on a git host too, where links between folders work; here these files are pages or code to read.
PAGES = {"../README.md": "start.md", "../CHANGELOG.md": "changelog.md", "../SECURITY.md": "security.md"}


def keep_links_inside(app, docname, source):
    """Links that leave docs/ lead to the page that includes the file, or become the file's name."""

    def inside(match):
        text, target = match.groups()
        path, _, anchor = target.partition("#")
        if path in PAGES:
            return f"[{text}]({PAGES[path]}{'#' * bool(anchor)}{anchor})"
        return text if text.startswith("`") else f"{text} (`{path.removeprefix('../')}`)"

    source[0] = re.sub(r"\[([^\]]*)\]\((\.\./[^)\s]+)\)", inside, source[0])


def mathml(formula, display):
    """A formula as MathML, which browsers draw without scripts and without a network."""
    formula = re.sub(r"\\[bB]igg?(?![A-Za-z])", "", formula)  # browsers fit brackets to what they enclose
    markup = convert(formula, display=display)
    bars = r'<mo stretchy="false" lspace="0" rspace="0">\1'  # those of a norm are close and stay at the line
    markup = re.sub("<mo>(&#x0007C;|&#x02016;)", bars, markup)
    unknown = re.findall(r">(\\\w+)<", markup)
    if unknown:
        getLogger(__name__).warning("latex2mathml does not know %s in %s", unknown[0], formula)
    return markup


def inline_math(translator, node):
    """Write a formula within a line."""
    translator.body.append(mathml(node.astext(), "inline"))
    raise SkipNode


def display_math(translator, node):
    """Write a formula on a line of its own."""
    translator.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>')
    raise SkipNode


def notebook_as_page(app, docname, source):
    """Turn a notebook into Markdown: its text, its code, and the outputs that it was saved with."""
    if Path(app.env.doc2path(docname)).suffix == ".ipynb":
        source[0] = "\n\n".join(part for cell in json.loads(source[0])["cells"] for part in cell_parts(cell))


def cell_parts(cell):
    """Markdown of a cell and of its outputs."""
    text = "".join(cell["source"])
    yield text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if "image/png" in data:
            picture = data["image/png"].replace("\n", "")
            yield f'<div><img alt="Output of the code above" src="data:image/png;base64,{picture}"></div>'
        elif "text/html" in data:
            shown = "".join(data["text/html"]).replace("<table", '<table class="docutils"')
            yield f'<div class="table-wrapper">{shown}</div>'
        else:
            yield f"```text\n{''.join(data.get('text/plain', output.get('text', ''))).rstrip()}\n```"


def setup(app):
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (inline_math, None), (display_math, None))
    app.connect("source-read", notebook_as_page)
    app.connect("source-read", keep_links_inside)
    app.connect("include-read", lambda app, path, parent, source: from_the_root(source))


def from_the_root(source):
    """Links of a file above docs/ that is included in a page."""
    source[0] = re.sub(r"\]\(docs/", "](", source[0])
    for path, page in PAGES.items():
        source[0] = source[0].replace(f"]({path.removeprefix('../')}", f"]({page}")
    source[0] = re.sub(r"\[([^\]]*)\]\((?:CONTRIBUTING\.md|LICENSE)\)", r"\1", source[0])
