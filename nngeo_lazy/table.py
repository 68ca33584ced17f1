"""Rows that print as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Generic, TypeVar, overload

__all__ = ["Table"]

R = TypeVar("R")


class Table(Sequence[R], Generic[R]):
    """Dataclass rows that print as a table; a column that is empty throughout is left out.

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

    def __repr__(self) -> str:
        if not self._rows:
            return "\n".join(("(no rows)", *self._summary))
        columns = []
        for each in fields(self._rows[0]):  # type: ignore[arg-type]
            cells = [_cell(getattr(row, each.name)) for row in self._rows]
            if any(cells):
                columns.append([each.name, *cells])
        widths = [max(map(len, column)) for column in columns]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in zip(*columns, strict=True)
        ]
        return "\n".join((*lines, *self._summary))


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
