"""A step's vectors in one flat buffer: blocks of one shape side by side, turned all at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import DataError, NotPositiveDefiniteError
from ..layout import Layout, Piece
from ..operators import (
    BaseLinearOperator,
    BlockDiagonalLinearOperator,
    DenseLinearOperator,
    DiagonalLinearOperator,
    EigenKroneckerLinearOperator,
)
from ..sides import plain
from ..space import ParamSpace

__all__ = ["Coordinates", "EigenFrame", "Frame", "has_eigenvectors"]

Dampings = Mapping[str, float | None]  # by parameter; None is relative


class Shape(NamedTuple):
    """What blocks that are turned together have in common."""

    rows: int
    columns: int
    left: bool
    right: bool


class Place(NamedTuple):
    """Where entries of a parameter lie in the buffer: a strided view, and their shape."""

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    shape: torch.Size
    first: int  # of the entries


class Views:
    """The parameters in a buffer: most as one view, those of several blocks in pieces."""

    def __init__(self, buffer: Tensor, places: Mapping[str, Sequence[Place]]) -> None:
        self._pieces = {
            name: [(p, buffer.as_strided(p.sizes, p.strides, p.offset)) for p in pieces]
            for name, pieces in places.items()
        }

    def __len__(self) -> int:
        """How many parameters there are."""
        return len(self._pieces)

    def __getitem__(self, name: str) -> Tensor:
        """A parameter's numbers, in its order; a view if it lies in one piece."""
        pieces = self._pieces[name]
        return (
            pieces[0][1] if len(pieces) == 1 else torch.cat([view.flatten() for _, view in pieces])
        )

    def copy_(self, values: Mapping[str, Tensor]) -> None:
        """Set some parameters, given in any shape that has their order."""
        views, given = [], []
        for name, value in values.items():
            pieces = self._pieces[name]
            for place, view in pieces:
                mine = value
                if len(pieces) > 1:
                    mine = value.reshape(-1)[place.first : place.first + view.numel()]
                views.append(view)
                given.append(mine if mine.shape == view.shape else mine.reshape(view.shape))
        torch._foreach_copy_(views, given)

    def within(self, name: str, start: int, stop: int) -> list[Tensor]:
        """A parameter's entries in a range of the buffer."""
        return [view for place, view in self._pieces[name] if start <= place.offset < stop]


@dataclass(frozen=True)
class Block:
    """A block of the curvature, and the parameters in it."""

    name: str
    start: int
    size: int
    names: tuple[str, ...]
    shape: Shape


class Coordinates:
    """The order of all numbers of a step.

    First the blocks of the curvature, those of one shape side by side and those without
    eigenvectors last; then the parameters that have no curvature.

    Args:
        parameters: all, by name.
        F: the curvature of some of them, with known eigenvectors; None has no blocks.
        resolve: the name of a parameter from the one that F has.
        flat: parameters with a curvature whose eigenvectors are not known.

    Attributes:
        names: all parameters, in the order of the buffer.
        flat: as given.
        known: how many numbers have a curvature.
        size: how many there are.
        blocks: of the curvature, in the order of the buffer.
        groups: the blocks that are turned together: a slice, how many there are and their shape.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        F: BaseLinearOperator | None,
        resolve: Callable[[str], str],
        flat: Sequence[str] = (),
    ) -> None:
        self._places: dict[str, list[Place]] = {}
        self.flat = tuple(flat)
        self.blocks: list[Block] = []
        self.groups: list[tuple[slice, int, Shape]] = []
        self.order: list[int] = []
        self._structure = None if F is None else _structure(F)
        start = 0
        if F is not None and F.space is not None:
            parts = _parts(F)
            shapes = [_shape(member) for _, _, member in parts]
            turned = list(dict.fromkeys(s for s in shapes if s.left or s.right))
            for shape in [*turned, None]:
                first, count = start, 0
                for k, (name, layout, member) in enumerate(parts):
                    own = shapes[k] if shapes[k] in turned else None
                    if own != shape:
                        continue
                    inside = self._place(start, layout, F.space, parameters, resolve)
                    self.blocks.append(Block(name, start, layout.size, inside, shapes[k]))
                    self.order.append(k)
                    start += layout.size
                    count += member.shape[-1] // (shapes[k].rows * shapes[k].columns)
                if shape is not None:
                    self.groups.append((slice(first, start), count, shape))
        self.turned = self.groups[-1][0].stop if self.groups else 0
        self.known = start + sum(parameters[name].numel() for name in flat)
        for name in [*flat, *parameters]:
            if name not in self._places:
                p = parameters[name]
                place = Place(start, tuple(p.shape), _strides(p.shape), p.shape, 0)
                self._places[name] = [place]
                start += p.numel()
        for pieces in self._places.values():
            pieces.sort(key=lambda place: place.first)
        self.size = start
        self.names = list(self._places)

    def _place(
        self,
        start: int,
        layout: Layout,
        space: ParamSpace,
        parameters: Mapping[str, Tensor],
        resolve: Callable[[str], str],
    ) -> tuple[str, ...]:
        """Place a block's parameters, or some entries of one; a piece may hold neighbours."""
        column, found = 0, []
        for piece, where in zip(layout.pieces, layout.slices, strict=True):
            inside = [
                n
                for n, s in space.slices.items()
                if max(s.start, where.start) < min(s.stop, where.stop)
            ]
            for name in inside:
                own, mine = resolve(name), space.slices[name]
                shape, first = parameters[own].shape, max(0, where.start - mine.start)
                if len(inside) == 1:
                    if where.stop - where.start < shape.numel():  # some of its entries
                        shape = torch.Size([where.stop - where.start])
                    place = _in_grid(start, column, layout, piece, shape, first)
                else:  # one after the other in a row
                    at = start + column + mine.start - where.start
                    place = Place(at, tuple(shape), _strides(shape), shape, 0)
                self._places.setdefault(own, []).append(place)
                found.append(own)
            column += piece.width
        return tuple(found)

    def numel(self, name: str) -> int:
        """How many numbers a parameter has."""
        return sum(math.prod(place.sizes) for place in self._places[name])

    def views(self, buffer: Tensor) -> Views:
        """The parameters' parts of a buffer."""
        return Views(buffer, self._places)

    def serves(self, F: BaseLinearOperator) -> bool:
        """Whether they are what would be made of this curvature, which has known eigenvectors."""
        return self._structure == _structure(F)

    def same(self, other: Coordinates) -> bool:
        """Whether a buffer of the other is one of this."""
        mine = self._places, self.groups, self.known
        return mine == (other._places, other.groups, other.known)


class Frame:
    """Coordinates as they are, with some way to solve with the curvature.

    Args:
        coordinates: of the buffers.
        solve: (F + damping)^-1 v of a buffer's known part; None is zero.
        cheap: whether a step may solve twice.
    """

    def __init__(
        self,
        coordinates: Coordinates,
        solve: Callable[[Tensor], Tensor] | None,
        cheap: bool = True,
    ) -> None:
        self.coordinates, self.cheap = coordinates, cheap
        self._solve = solve

    def rotate(self, x: Tensor, out: Tensor) -> None:
        """Into the frame."""
        out.copy_(x)

    def unrotate(self, x: Tensor, out: Tensor) -> None:
        """Out of the frame."""
        out.copy_(x)

    def precondition(self, y: Tensor, out: Tensor) -> None:
        """(F + damping)^-1 y, of the known part, in the frame."""
        if self._solve is None:
            out.zero_()
        else:
            out.copy_(self._solve(y))


class EigenFrame(Frame):
    """The eigenvectors of the curvature: a solve is a division.

    Args:
        coordinates: made from this F or one with the same blocks.
        F: its blocks have known eigenvectors.

    Attributes:
        weights: (known,) eigenvalues of the damped curvature, times a unit.
    """

    def __init__(self, coordinates: Coordinates, F: BaseLinearOperator) -> None:
        super().__init__(coordinates, None)
        parts = _parts(F)
        members = [parts[k][2] for k in coordinates.order]
        systems = [_eigensystem(member) for member in members]
        self._values = torch.cat([values.reshape(-1) for values, _, _ in systems]).clamp_min(0)
        self._bases: list[tuple[Tensor | None, Tensor | None]] = []
        first = 0
        for where, _, shape in coordinates.groups:
            stop = first
            while stop < len(members) and coordinates.blocks[stop].start < where.stop:
                stop += 1
            left = _joined([systems[k][1] for k in range(first, stop)]) if shape.left else None
            right = _joined([systems[k][2] for k in range(first, stop)]) if shape.right else None
            self._bases.append((left, right))
            first = stop
        self.weights = self._values

    def damp(
        self,
        dampings: Dampings,
        eps: float,
        unit: Tensor | float,
        least: Mapping[str, Tensor],
    ) -> None:
        """Set the weights to (eigenvalues + damping) times a unit.

        Args:
            dampings: of each parameter; None for eps times the mean eigenvalue of its block.
            eps: a relative damping.
            unit: what the curvature is multiplied by.
            least: of each parameter, what that mean times the unit counts as at least.

        Raises:
            DataError: a block's parameters have different dampings.
            NotPositiveDefiniteError: an eigenvalue is zero, and so is its damping.
        """
        known, zero = self.coordinates.known, False
        weights = self._values.new_zeros(self.coordinates.size)
        weights[:known] = self._values
        tiny = torch.finfo(weights.dtype).tiny
        views = self.coordinates.views(weights)
        for block in self.coordinates.blocks:
            stop, exact = block.start + block.size, block.shape.left or block.shape.right
            given = {dampings[name] for name in block.names}
            if exact and len(given) > 1:
                raise DataError(
                    f"expected one damping in each block, but the groups give "
                    f"[{', '.join(sorted(map(str, given)))}] to parts of {block.name!r}: put its "
                    "parameters into one group, or give both the same damping"
                )
            whole = weights[block.start : stop]
            mean = whole.mean()
            seen = {n: self.coordinates.numel(n) for n in block.names if n in least}
            if seen:
                squares = torch.stack([n * least[name] for name, n in seen.items()]).sum()
                mean = torch.maximum(mean, (squares / (unit * sum(seen.values()))).to(mean))
            relative = eps * mean + tiny**0.5
            parts = [(n, v) for n in block.names for v in views.within(n, block.start, stop)]
            for name, part in [(block.names[0], whole)] if exact else parts:
                damping = dampings[name]
                if damping is None:
                    part += relative
                    continue
                rounding = part.max() * part.numel() * torch.finfo(part.dtype).eps if exact else 0.0
                zero |= not damping and bool((part <= rounding).any())
                part += damping
        if zero:
            raise NotPositiveDefiniteError(
                "the damped curvature is singular: raise damping, or leave damping=None, which "
                "damps relative to each block's mean eigenvalue"
            )
        self.weights = weights[:known] * unit

    def rotate(self, x: Tensor, out: Tensor) -> None:
        """Into the eigenvectors."""
        self._turn(x, out, True)

    def unrotate(self, x: Tensor, out: Tensor) -> None:
        """Out of the eigenvectors."""
        self._turn(x, out, False)

    def precondition(self, y: Tensor, out: Tensor) -> None:
        """By division."""
        torch.div(y, self.weights, out=out)

    def overlapped(self, old: EigenFrame, values: Tensor) -> Tensor:
        """The diagonal, in this frame, of a matrix that is diagonal in an old one."""
        moved = values.clone()
        for k, (where, count, shape) in enumerate(self.coordinates.groups):
            grid = values[where].view(count, shape.rows, shape.columns)
            (left, right), (was_left, was_right) = self._bases[k], old._bases[k]
            if left is not None and was_left is not None:
                grid = (left.mT @ was_left).square() @ grid
            if right is not None and was_right is not None:
                grid = grid @ (right.mT @ was_right).square().mT
            moved[where] = grid.reshape(-1)
        return moved

    def _turn(self, x: Tensor, out: Tensor, inverse: bool) -> None:
        for (where, count, shape), (left, right) in zip(
            self.coordinates.groups, self._bases, strict=True
        ):
            size = (count, shape.rows, shape.columns)
            grid, to = x[where].view(size), out[where].view(size)
            if left is not None:
                by = left.mT if inverse else left  # (B,o,o),(B,o,i) -> (B,o,i)
                grid = torch.bmm(by, grid, out=None if right is not None else to)
            if right is not None:
                torch.bmm(grid, right if inverse else right.mT, out=to)
        if self.coordinates.turned < x.numel():
            out[self.coordinates.turned :].copy_(x[self.coordinates.turned :])


def has_eigenvectors(F: BaseLinearOperator) -> bool:
    """Whether an `EigenFrame` can be made of it."""
    kinds = (EigenKroneckerLinearOperator, DiagonalLinearOperator, DenseLinearOperator)
    return all(
        isinstance(member, kinds)
        and (not isinstance(member, EigenKroneckerLinearOperator) or _plain(member))
        for _, _, member in _parts(F)
    )


def _plain(member: EigenKroneckerLinearOperator) -> bool:
    """Whether its bases are matrices, or the identity."""
    return all(plain(basis) for basis in member.bases())


def _parts(F: BaseLinearOperator) -> list[tuple[str, Layout, BaseLinearOperator]]:
    if isinstance(F, BlockDiagonalLinearOperator):
        return F.parts
    if F.space is None:
        raise TypeError("expected a curvature of named parameters")
    return [("the whole matrix", Layout.flat(list(F.space.slices.values())), F)]


def _structure(F: BaseLinearOperator) -> tuple[Any, ...]:
    names = () if F.space is None else F.space.names
    return names, [(name, layout, _shape(member)) for name, layout, member in _parts(F)]


def _shape(member: BaseLinearOperator) -> Shape:
    if isinstance(member, EigenKroneckerLinearOperator):
        _, rows, columns = member.values.shape
        left, right = member.bases()
        return Shape(rows, columns, left.dim() == 3, right.dim() == 3)
    return Shape(member.shape[-1], 1, isinstance(member, DenseLinearOperator), False)


def _eigensystem(member: BaseLinearOperator) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Eigenvalues and the two bases (G, n, n)."""
    if isinstance(member, EigenKroneckerLinearOperator):
        return member.values, *member.bases()
    if isinstance(member, DenseLinearOperator):
        basis = member.basis()
        return member.eigenvalues, basis.to_dense().unsqueeze(0), None
    return member.eigenvalues, None, None


def _joined(bases: Sequence[Tensor | None]) -> Tensor:
    known = [basis for basis in bases if basis is not None]
    return known[0] if len(known) == 1 else torch.cat(known)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _in_grid(
    start: int, column: int, layout: Layout, piece: Piece, shape: torch.Size, first: int
) -> Place:
    """The strided view of one piece of a block's grid."""
    count, width = layout.groups * layout.rows, layout.width
    grid = torch.empty(1, device="meta").as_strided(
        (count, piece.width), (width, 1), start + column
    )
    if piece.transposed:
        outer = piece.width // piece.inner
        grid = grid.as_strided(
            (layout.groups, outer, layout.rows, piece.inner),
            (layout.rows * width, piece.inner, width, 1),
            start + column,
        )
    with suppress(RuntimeError):  # else no strides give the shape: gradients are reshaped
        grid = grid.view(shape)
    return Place(start + column, tuple(grid.shape), grid.stride(), shape, first)
