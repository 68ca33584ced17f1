"""The sum of several outer forms of one weight, which is used in different layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..layout import Layout
from .forms import Form, Outer

__all__ = ["Summed", "at_zero"]


@dataclass(frozen=True)
class Summed(Form):
    """The sum of several `Outer`s of one weight, such as an embedding's and its tied head's.

    Its coordinates are the weight's own, as it is stored.

    Attributes:
        outers: one for each layout in which the weight is used.
        layouts: for each of them, how its coordinates lie in the weight: one piece, which starts
            at zero.
    """

    outers: tuple[Outer, ...]
    layouts: tuple[Layout, ...]

    @property
    def shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        """(R, N, p)."""
        return self.outers[0].shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Of the rows."""
        return self.outers[0].dtype

    def examples(self, start: int, stop: int) -> Summed:
        """The same of a range of examples."""
        return replace(self, outers=tuple(outer.examples(start, stop) for outer in self.outers))

    def direction(self, r: int) -> Summed:
        """The same in one direction."""
        return replace(self, outers=tuple(outer.direction(r) for outer in self.outers))

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The rows themselves, (R, n, p), of a range of examples."""
        return self._sum(lambda outer: outer.rows(start, stop).unsqueeze(-1)).squeeze(-1)

    def total(self) -> Tensor:
        """Sum over r, n of the rows, (p,)."""
        return self._sum(lambda outer: outer.total().unsqueeze(-1)).squeeze(-1)

    def sqsum(self) -> Tensor:
        """A direction at a time: a tied embedding's row is as large as the vocabulary."""
        out = self.outers[0].g.new_zeros(self.shape[2])
        for r in range(self.shape[0]):
            alone = tuple(replace(outer, g=outer.g[r : r + 1]) for outer in self.outers)
            one = replace(self, outers=alone)
            for a, b in one.tiles():
                out += one.rows(a, b).square_().sum((0, 1))
        return out

    def rotated(self, left: Tensor | None, right: Tensor | None) -> Summed:
        """The same in the basis left kron right of the weight's matrix (see `Outer.prepared`)."""
        outers = []
        for outer, layout in zip(self.outers, self.layouts, strict=True):
            own = (right, left) if layout.pieces[0].transposed else (left, right)
            x = None if outer.inputs is None else outer.inputs.prepared(own[1], bias=False)
            outers.append(outer.prepared(x, False, own[0]))
        return replace(self, outers=tuple(outers))

    def outer_of(self, layout: Layout) -> Outer:
        """The uses that lie in the weight in one way."""
        return self.outers[self.layouts.index(layout)]

    def jvp(self, vectors: Tensor) -> Tensor:
        """Rows times columns: (p, k) -> (R, N, k)."""
        parts = [
            outer.jvp(layout.gather(vectors))
            for outer, layout in zip(self.outers, self.layouts, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def vjp(self, weights: Tensor) -> Tensor:
        """Weighted sum of the rows: (R, N, k) -> (p, k)."""
        return self._sum(lambda outer: outer.vjp(weights))

    def _sum(self, operation: Callable[[Outer], Tensor]) -> Tensor:
        """The sum of (..., p, k) results of the outers, in the weight's coordinates."""
        total: Tensor | None = None
        for outer, layout in zip(self.outers, self.layouts, strict=True):
            ((_, stored),) = layout.scatter(operation(outer))
            total = stored if total is None else total + stored
        if total is None:
            raise ValueError("a sum of no forms")
        return total


def at_zero(layout: Layout) -> Layout:
    """The layout of one piece in a vector that begins with it."""
    return layout.shifted({piece.start: 0 for piece in layout.pieces})
