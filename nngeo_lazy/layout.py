"""Where the coordinates of a block lie in the flat parameter vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import DataError

__all__ = ["Layout", "Piece", "assemble", "require_tiling"]


@dataclass(frozen=True)
class Piece:
    """One parameter inside a block: `width` columns of every row, at `start` of the flat vector.

    Attributes:
        start: where it begins.
        width: how many columns of each row it fills.
        transposed: it is stored (groups, width / inner, rows, inner) instead of (groups, rows,
            width): its columns are (outer, inner), and the rows lie between the two.
        inner: how many columns lie side by side in a transposed parameter: 1 for a weight (in,
            out), the kernel's volume for a transposed convolution's (in, out, *kernel).
    """

    start: int
    width: int
    transposed: bool = False
    inner: int = 1

    def to_grid(self, stored: Tensor, rows: int) -> Tensor:
        """The parameter's numbers (..., G rows width, k) as (..., G rows, width, k)."""
        (*lead, n, k), width = stored.shape, self.width  # no -1: there may be no columns
        if self.transposed:
            shape = (n // (rows * width), width // self.inner, rows, self.inner)
            stored = stored.reshape(*lead, *shape, k).transpose(-4, -3)
        return stored.reshape(*lead, n // width, width, k)

    def from_grid(self, grid: Tensor, rows: int) -> Tensor:
        """The inverse of `to_grid`."""
        *lead, count, width, k = grid.shape
        if self.transposed:
            shape = (count // rows, rows, width // self.inner, self.inner)
            grid = grid.reshape(*lead, *shape, k).transpose(-4, -3)
        return grid.reshape(*lead, count * width, k)


@dataclass(frozen=True)
class Layout:
    """A block's coordinates (group, row, column), row-major, and its pieces' flat positions.

    A weight (out, in) with its bias is the grid (1, out, in + 1) whose last column is the bias. A
    grouped convolution has several groups. A weight stored (in, out) is a transposed piece.
    Parameters that merely follow each other are pieces of a grid with a single row.

    The block's vector has length p = groups * rows * width. The map from flat to block coordinates
    is a permutation, applied by slicing, so that no index is stored.
    """

    groups: int
    rows: int
    pieces: tuple[Piece, ...]

    @classmethod
    def flat(cls, slices: Sequence[slice]) -> Layout:
        """Parameters one after the other."""
        return cls(1, 1, tuple(Piece(s.start, s.stop - s.start) for s in slices))

    @property
    def width(self) -> int:
        """How many columns a row has, over all pieces."""
        return sum(piece.width for piece in self.pieces)

    @property
    def size(self) -> int:
        """How many coordinates the block has: p = groups * rows * width."""
        return self.groups * self.rows * self.width

    @property
    def slices(self) -> tuple[slice, ...]:
        """The flat positions of each piece."""
        count = self.groups * self.rows
        return tuple(slice(p.start, p.start + p.width * count) for p in self.pieces)

    def gather(self, vectors: Tensor) -> Tensor:
        """Flat (..., P, k) to this block's (..., p, k)."""
        parts = [
            piece.to_grid(vectors[..., where, :], self.rows)
            for piece, where in zip(self.pieces, self.slices, strict=True)
        ]
        joint = parts[0] if len(parts) == 1 else torch.cat(parts, -2)
        return joint.reshape(*vectors.shape[:-2], self.size, vectors.shape[-1])

    def scatter(self, vectors: Tensor) -> list[tuple[int, Tensor]]:
        """This block's (..., p, k) to the pieces (flat start, (..., n, k)); see `assemble`."""
        lead, k = vectors.shape[:-2], vectors.shape[-1]
        grid = vectors.reshape(*lead, self.groups * self.rows, self.width, k)
        parts = grid.split([piece.width for piece in self.pieces], -2)
        return [
            (piece.start, piece.from_grid(part, self.rows))
            for piece, part in zip(self.pieces, parts, strict=True)
        ]

    def positions(self) -> Tensor:
        """The flat position of each block coordinate, as an index (p,)."""
        stop = max(where.stop for where in self.slices)
        return self.gather(torch.arange(stop, device="cpu").unsqueeze(-1)).squeeze(-1)

    def shifted(self, starts: dict[int, int]) -> Layout:
        """The same block in another flat vector: `starts` maps old to new piece starts."""
        moved = tuple(replace(piece, start=starts[piece.start]) for piece in self.pieces)
        return Layout(self.groups, self.rows, moved)


def assemble(placed: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Pieces (flat start, (..., n, k)) that partition the flat vector, to (..., P, k).

    A concatenation rather than writes into an empty vector: it has a gradient, and `vmap`.
    """
    return torch.cat([part for _, part in sorted(placed, key=lambda pair: pair[0])], -2)


def require_tiling(layouts: Sequence[Layout]) -> None:
    """Raise DataError unless the blocks' pieces follow each other without a gap or an overlap."""
    slices = sorted(
        (where.start, where.stop, piece.width % max(1, piece.inner))
        for layout in layouts
        for where, piece in zip(layout.slices, layout.pieces, strict=True)
    )
    end = 0
    for start, stop, rest in slices:
        if start != end or stop <= start or rest:
            raise DataError(
                f"expected blocks that follow each other, but one begins at {start} and the one "
                f"before it ends at {end}: the file was altered"
            )
        end = stop
