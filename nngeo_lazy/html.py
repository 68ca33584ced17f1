"""Tables for notebooks: what `_repr_html_` of operators, reports and results returns."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

__all__ = ["bar", "page", "size", "table"]

# colours follow the notebook's own; only the bar has one
_CELL = "text-align:left;padding:2px 10px 2px 0;border:none;white-space:nowrap"
_BAR = "display:inline-block;height:0.7em;background:#3f51b5;border-radius:2px"


def page(title: str, *parts: str) -> str:
    """A title above some parts; those that are empty are left out."""
    shown = "".join(part for part in parts if part)
    return f"<div><strong>{html.escape(title)}</strong>{shown}</div>"


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table. Cells that `bar` made stay as they are; all others are escaped text."""
    top = "".join(f'<th style="{_CELL}">{html.escape(head)}</th>' for head in heads)
    lines = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{_cell(cell)}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    return f'<table style="border:none"><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>'


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def bar(value: float, largest: float, text: str) -> Markup:
    """A bar whose length is the share of the largest value, with a text beside it."""
    share = value / largest if largest > 0 else 0.0
    width = f'style="{_BAR};width:{6 * share:.2f}em"'
    return Markup(f"<span {width}></span> {html.escape(text)}")


def size(count: float) -> str:
    """A number of bytes for people.

    Example:
        >>> size(312), size(5_300_000)
        ('312 B', '5.1 MiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def _cell(value: Any) -> str:
    if isinstance(value, Markup):
        return value
    return html.escape(f"{value:,}" if isinstance(value, int) else str(value))
