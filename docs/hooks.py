"""What the site does to its pages: formulas become MathML, links to examples open the gallery.

Formulas are written once, in LaTeX, as `$$...$$` on pages and as `.. math::` in docstrings. They
become MathML when the site is built, which browsers draw by themselves. So pages load no script.
"""

from __future__ import annotations

import html
import re
import textwrap
from typing import Any

import griffe
from latex2mathml.converter import convert

EXAMPLE_LINK = re.compile(r"\]\((?:\.\./)+examples/(\w+)\.py\)")
DISPLAY = re.compile(r'<(div|span) class="arithmatex">\\([\[(])(.*?)\\[\])]</\1>', re.DOTALL)
SHIM = "https://unpkg.com/iframe-worker/shim"
MATH_DIRECTIVE = re.compile(r"^( *)\.\. math::((?:.*)(?:\n(?:\1 +\S.*|[ ]*(?=\n\1 +\S)))*)", re.M)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to the sources of examples, which GitHub shows, open their pages on the site."""
    depth = "../" * page.file.src_uri.count("/")
    return EXAMPLE_LINK.sub(rf"]({depth}gallery/\1.md)", markdown)


def on_page_content(html_text: str, **_: Any) -> str:
    """LaTeX to MathML."""

    def drawn(found: re.Match[str]) -> str:
        display = "block" if found[2] == "[" else "inline"
        made = convert(html.unescape(found[3]).strip(), display=display)
        return f'<div class="formula">{made}</div>' if display == "block" else made

    return DISPLAY.sub(drawn, html_text)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """The theme's one script from another server is a file of the site."""
    depth = "../" * page.file.src_uri.count("/")
    return output.replace(SHIM, f"{depth}javascripts/iframe-worker.js")


def on_post_template(output_content: str, **_: Any) -> str:
    """The same for pages without a source, such as that of lost addresses."""
    return output_content.replace(SHIM, "/javascripts/iframe-worker.js")


class PlainDocstrings(griffe.Extension):
    """Docstrings as the package writes them, in the Markdown that the site reads."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """`.. math::` to `$$`, and the headings of examples as the parser names them."""

    def displayed(found: re.Match[str]) -> str:
        indent, formula = found[1], textwrap.dedent(found[2].strip("\n"))
        lines = " ".join(line.strip() for line in formula.splitlines())
        return f"{indent}$$\n{indent}{lines.strip()}\n{indent}$$\n"

    text = MATH_DIRECTIVE.sub(displayed, docstring)
    return re.sub(r"^Example:$", "Examples:", text, flags=re.M)
