"""Kernels of rows that are made anew: in panels, so that only some of the rows are ever held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import SpaceMismatchError
from ..jacobian.grams import settled
from .base import BaseLinearOperator
from .factored import FactoredJacobianLinearOperator
from .matrix_free import JacobianLinearOperator

__all__ = [
    "START",
    "Keep",
    "Panels",
    "Place",
    "Rows",
    "Tile",
    "of_output",
    "panels",
    "rows_of",
    "rows_of_an_example",
]

PANEL_BYTES = 2**27  # of rows that are held while the other ones pass by

Rows = Callable[[int], Iterator[FactoredJacobianLinearOperator]]  # of the batches from a number on
Product = Callable[[FactoredJacobianLinearOperator, FactoredJacobianLinearOperator], Tensor]


class Place(NamedTuple):
    """Where a panel begins.

    Attributes:
        batch: the number of its first batch.
        row: the kernel's row of that batch's first example.
    """

    batch: int
    row: int


START = Place(0, 0)


Keep = Callable[[Rows, int], Rows]  # of the rows of the first or the second set of inputs


@dataclass(frozen=True)
class Tile:
    """Some entries of a kernel.

    Attributes:
        rows: of the kernel.
        columns: of the kernel.
        values: (rows, columns).
        symmetric: whether the transpose of these entries is the kernel's too.
    """

    rows: slice
    columns: slice
    values: Tensor
    symmetric: bool

    def write(self, out: Tensor) -> None:
        """Put the entries into the whole matrix."""
        out[self.rows, self.columns] = self.values
        if self.symmetric:
            out[self.columns, self.rows] = self.values.mT


Panels = Iterator[tuple[Place, Iterator[Tile]]]


def rows_of(J: BaseLinearOperator) -> Rows | None:
    """The rows of a Jacobian a batch at a time; None if it has products alone."""
    if isinstance(J, FactoredJacobianLinearOperator):
        return J.each_batch
    return J.each_batch() if isinstance(J, JacobianLinearOperator) else None


def panels(
    left: Rows, right: Rows | None, product: Product, directions: str, start: Place
) -> Panels:
    """The tiles of each panel of rows, and where the next one begins: exhaust each before the next.

    A panel is held while all columns pass by. Of a symmetric kernel only the columns up to the
    panel's own are made.

    Args:
        left: the rows.
        right: those of the columns; None if both are one.
        product: two batches to the entries between them.
        directions: "all" or "same", as of inner products.
        start: where to begin.
    """
    while held := _panel(left, start.batch, directions):
        after = _after(start, held, directions)
        tiles = _tiles(held, left, right, product, directions, start)
        del held  # before the next panel is made
        yield after, tiles
        start = after


def _after(start: Place, held: list[FactoredJacobianLinearOperator], directions: str) -> Place:
    """Where the panel behind this one begins."""
    counts = [n * (r if directions == "all" else 1) for J in held for n, r in J.row_shapes]
    return Place(start.batch + len(held), start.row + sum(counts))


def _panel(rows: Rows, start: int, directions: str) -> list[FactoredJacobianLinearOperator]:
    """As many batches as fit, one at least; none if there are no more."""
    held: list[FactoredJacobianLinearOperator] = []
    size = 0
    with closing(rows(start)) as batches:  # type: ignore[type-var]
        for J in batches:
            held.append(_settled(J, directions))
            size += sum(tensor.nbytes for tensor in held[-1]._args)
            if size >= PANEL_BYTES:
                break
    return held


def _settled(J: FactoredJacobianLinearOperator, directions: str) -> FactoredJacobianLinearOperator:
    """With the rows themselves, if inner products are made from them."""
    return J._of(
        [[form and settled(form, directions, PANEL_BYTES // 2) for form in b] for b in J.batches]
    )


def _tiles(
    held: list[FactoredJacobianLinearOperator],
    left: Rows,
    right: Rows | None,
    product: Product,
    directions: str,
    start: Place,
) -> Iterator[Tile]:
    symmetric, stop, column = right is None, _after(start, held, directions), 0
    with closing((right or left)(0)) as others:  # type: ignore[type-var]
        for each in islice(others, start.batch if symmetric else None):
            other = _settled(each, directions)
            values = torch.cat([product(J, other) for J in held])
            columns = slice(column, column + values.shape[1])
            yield Tile(slice(start.row, stop.row), columns, values, symmetric)
            column = columns.stop
    for k, other in enumerate(held if symmetric else []):
        values = torch.cat([product(J, other) for J in held[k:]])
        columns = slice(column, column + values.shape[1])
        yield Tile(slice(column, stop.row), columns, values, symmetric)
        column = columns.stop


def rows_of_an_example(J: BaseLinearOperator) -> int:
    """How many rows of a Jacobian each example has."""
    if isinstance(J, FactoredJacobianLinearOperator):
        return J.row_shapes[0][1]
    if not J.num_examples:
        raise SpaceMismatchError("a kernel needs Jacobians that know how many examples they have")
    rows: int = J.shape[0]
    return rows // J.num_examples


def of_output(J: BaseLinearOperator, c: int, count: int) -> BaseLinearOperator:
    """The rows of one output."""
    if count == 1:
        return J
    if isinstance(J, FactoredJacobianLinearOperator):
        return J.direction(c)
    rows: BaseLinearOperator = J._getitem(slice(c, None, count), slice(None))
    return rows
