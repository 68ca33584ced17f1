"""Rows that print as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Generic, TypeVar, overload

from . import html

__all__ = ["Table"]

R = TypeVar("R")


class Table(Sequence[R], Generic[R]):
    """Dataclass rows that print as a table, without columns that are empty or zero throughout.

    Args:
        rows: of one dataclass, whose fields name the columns.
        summary: lines below the table.
    """

    def __init__(self, rows: Sequence[R], summary: Sequence[str] = ()) -> None:
        self._rows = tuple(rows)
        self._summary = tuple(summary)

    @overload
    def __getitem__(self, index: int) -> R: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[R, ...]: ...
    def __getitem__(self, index: int | slice) -> R | tuple[R, ...]:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def _columns(self) -> list[list[str]]:
        """Those that are not empty or zero, each with its name first."""
        columns = []
        for each in fields(self._rows[0]):  # type: ignore[arg-type]
            cells = [_cell(getattr(row, each.name)) for row in self._rows]
            if any(cell not in ("", "0") for cell in cells):
                columns.append([each.name, *cells])
        return columns

    def _repr_html_(self) -> str:
        """In a notebook: the same table, with a bar of bytes."""
        title = "; ".join(self._summary) or f"{len(self._rows):,} rows"
        if not self._rows:
            return html.page(title)
        heads, *rows = (list(line) for line in zip(*self._columns(), strict=True))
        if "bytes" in heads:
            column = heads.index("bytes")
            known: Any = self._rows  # of a dataclass with bytes
            taken = [int(row.bytes) for row in known]
            for row, each in zip(rows, taken, strict=True):
                row[column] = html.bar(each, max(taken), html.size(each))
        return html.page(title, html.table(heads, rows))

    def __repr__(self) -> str:
        if not self._rows:
            return "\n".join(("(no rows)", *self._summary))
        columns = self._columns()
        widths = [max(map(len, column)) for column in columns]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in zip(*columns, strict=True)
        ]
        return "\n".join((*lines, *self._summary))


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
