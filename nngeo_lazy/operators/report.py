"""A table of how each parameter is represented, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..html import bar, page, size, table
from ..table import Table

if TYPE_CHECKING:
    from .base import BaseLinearOperator

__all__ = ["Report", "Row", "make_report", "operator_html"]


@dataclass(frozen=True)
class Row:
    """One parameter.

    Attributes:
        parameter: its name.
        layer: the path of the module that owns it.
        form: how its Jacobian was computed.
        block: the kind of block it lies in, with the sizes of what is stored.
        size: how many numbers the parameter has.
        bytes: what its block takes; 0 if an earlier row counts that block.
        note: why a fallback was taken; empty if none was.
    """

    parameter: str
    layer: str
    form: str
    block: str
    size: int
    bytes: int
    note: str


class Report(Table[Row]):
    """Rows that print as a table.

    Attributes:
        bytes: what the whole operator takes.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        super().__init__(rows)
        self.bytes = sum(row.bytes for row in rows)


def nbytes(operator: BaseLinearOperator) -> int:
    """What the tensors of an operator take."""
    return sum(t.numel() * t.element_size() for t in operator.representation())


def make_report(operator: BaseLinearOperator) -> Report:
    """The rows of an operator; a bare matrix has one for each block."""
    parts = list(getattr(operator, "parts", None) or [("", None, operator)])
    space = operator.space
    if space is None:
        return Report(
            [
                Row(name, name, "", part._kind(), part.shape[-1], nbytes(part), "")
                for name, _, part in parts
            ]
        )
    found: dict[str, Row] = {}
    for _, layout, part in parts:
        starts = None if layout is None else {piece.start for piece in layout.pieces}
        counted = False
        for name in space.names:
            where = space.slices[name]
            if starts is not None and where.start not in starts:
                continue
            origin = operator.info.origins.get(name)
            found[name] = Row(
                name,
                origin.layer if origin else space.owner(name),
                origin.form if origin else "",
                part._kind(),
                where.stop - where.start,
                0 if counted else nbytes(part),
                origin.note if origin else "",
            )
            counted = True
    return Report([found[name] for name in space.names])


def operator_html(operator: BaseLinearOperator) -> str:
    """A title, and a row for each block: its kind, and a bar of what it takes."""
    taken = nbytes(operator)
    title = f"{operator!r}, {size(taken)}"
    if operator.space is None or operator.dim() != 2 or not operator.is_square:
        return page(title)
    kinds: dict[tuple[str, str], list[int]] = {}
    for row in make_report(operator):
        sums = kinds.setdefault((row.layer, row.block), [0, 0])
        sums[0] += row.size
        sums[1] += row.bytes
    largest = max(each for _, each in kinds.values())
    rows = [
        (layer or "(the model)", block, numbers, bar(each, largest, size(each)))
        for (layer, block), (numbers, each) in kinds.items()
    ]
    return page(title, table(("layer", "block", "parameters", "bytes"), rows))
