"""A block-diagonal matrix over named, unequal blocks of any kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor

from ..errors import NonFiniteError, NotPositiveDefiniteError
from ..layout import Layout, assemble
from . import rules
from .base import BaseLinearOperator, Krylov
from .damping import Damping
from .info import Info

__all__ = ["BlockDiagonalLinearOperator"]


class BlockDiagonalLinearOperator(BaseLinearOperator):
    r"""Blocks on the diagonal, each with its own coordinates of the flat vector.

    .. math:: F v = \sum_b P_b^T B_b P_b v

    with P_b the coordinates of block b (`Layout.gather`), which partition the flat vector. Every
    member maps over the blocks.

    Args:
        *blocks: square operators or tensors of any sizes.
        info: what is known besides the numbers.
        names: of the blocks; by default their positions.
        layouts: where each block lies in the flat vector, which they partition; by default one
            after the other.

    Example:
        >>> from nngeo_lazy.operators import DenseLinearOperator, DiagonalLinearOperator
        >>> F = BlockDiagonalLinearOperator(
        ...     DenseLinearOperator(2 * torch.eye(2)), DiagonalLinearOperator(torch.ones(1)))
        >>> F.solve(torch.tensor([2.0, 4.0, 3.0]))
        tensor([1., 2., 3.])
    """

    def __init__(
        self,
        *blocks: Any,
        info: Info | None = None,
        names: Iterable[str] | None = None,
        layouts: Iterable[Layout] | None = None,
    ) -> None:
        if not blocks:
            raise ValueError("expected at least one block")
        members: tuple[BaseLinearOperator, ...] = tuple(map(rules.as_operator, blocks))
        names = map(str, range(len(members))) if names is None else names
        self.names: tuple[str, ...] = tuple(names)
        self.layouts = _contiguous(members) if layouts is None else tuple(layouts)
        sizes = [layout.size for layout in self.layouts]
        if sizes != [m.shape[-1] for m in members] or len(self.names) != len(members):
            raise ValueError(
                f"expected a name and a layout for each block, of sizes "
                f"{[m.shape[-1] for m in members]}, got {len(self.names)} names and sizes {sizes}"
            )
        super().__init__(*members, info=info, names=self.names, layouts=self.layouts)
        self.members = members

    @property
    def parts(self) -> list[tuple[str, Layout, BaseLinearOperator]]:
        """Name, layout and operator of each block."""
        return list(zip(self.names, self.layouts, self.members, strict=True))

    def same_blocks(self, other: BaseLinearOperator) -> TypeGuard[BlockDiagonalLinearOperator]:
        """Whether another operator is block diagonal over the same coordinates."""
        return isinstance(other, BlockDiagonalLinearOperator) and self.layouts == other.layouts

    # --- maps -----------------------------------------------------------------------------------

    def _columns(
        self, function: Callable[[int, BaseLinearOperator, Tensor], Tensor], v: Tensor
    ) -> Tensor:
        """Each block's coordinates of (..., P, k), through a function, and back."""
        placed: list[tuple[int, Tensor]] = []
        for k, (name, layout, block) in enumerate(self.parts):
            with _named(name):
                placed += layout.scatter(function(k, block, layout.gather(v)))
        return assemble(placed)

    def _entries(self, function: Callable[[BaseLinearOperator], Tensor]) -> Tensor:
        """A vector (p,) of each block, as one (P,)."""
        placed: list[tuple[int, Tensor]] = []
        for name, layout, block in self.parts:
            with _named(name):
                placed += layout.scatter(function(block).unsqueeze(-1))
        return assemble(placed).squeeze(-1)

    def _numbers(self, function: Callable[[BaseLinearOperator], Tensor]) -> Tensor:
        """A number of each block, stacked."""
        values = []
        for name, _, block in self.parts:
            with _named(name):
                values.append(function(block))
        return torch.stack(values)

    def _map(
        self, function: Callable[[BaseLinearOperator], BaseLinearOperator]
    ) -> BlockDiagonalLinearOperator:
        """An operator of each block."""
        blocks = []
        for name, _, block in self.parts:
            with _named(name):
                blocks.append(function(block))
        return self._of(blocks)

    def _of(
        self, blocks: Iterable[BaseLinearOperator], info: Info | None = None
    ) -> BlockDiagonalLinearOperator:
        """Other blocks in the same coordinates."""
        made = BlockDiagonalLinearOperator(*blocks, **self._kwargs)
        return made if info is None else cast(BlockDiagonalLinearOperator, made._with_info(info))

    def _joined(
        self, other: BlockDiagonalLinearOperator, function: Callable[[Any, Any], Any], info: Info
    ) -> Any:
        """A function of each pair of blocks, if both have the same ones."""
        if not self.same_blocks(other):
            return NotImplemented
        return self._of(map(function, self.members, other.members), info)

    # --- primitives -----------------------------------------------------------------------------

    @property
    def is_explicit(self) -> bool:
        """Whether all blocks' entries are known without products."""
        return all(member.is_explicit for member in self.members)

    def _size(self) -> torch.Size:
        size = sum(layout.size for layout in self.layouts)
        return torch.Size((size, size))

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        return self._map(lambda b: cast(BaseLinearOperator, b._transpose_nonbatch()))

    def _apply(self, v: Tensor) -> Tensor:
        return self._columns(lambda k, b, part: b._apply(part), v)

    def _solve_columns(self, v: Tensor, krylov: Krylov) -> Tensor:
        each = [krylov] * len(self.members)
        if krylov.x0 is not None:
            starts = [layout.gather(krylov.x0) for layout in self.layouts]
            each = [replace(krylov, x0=x0) for x0 in starts]
        preconditioner = krylov.preconditioner
        if preconditioner is not None:
            if isinstance(preconditioner, BlockDiagonalLinearOperator) and self.same_blocks(
                preconditioner
            ):
                parts = preconditioner.members
            else:
                parts = tuple(
                    preconditioner._principal(layout.positions().to(self.device), None, Info())
                    for layout in self.layouts
                )
            each = [replace(e, preconditioner=p) for e, p in zip(each, parts, strict=True)]
        return self._columns(lambda k, b, part: b._solve(part, krylov=each[k]), v)

    def _damp(self, damping: Damping, method: str) -> BaseLinearOperator:
        blocks = []
        for name, layout, block in self.parts:
            with _named(name):
                blocks.append(block._damp(Damping(damping.on(layout)), method))
        return self._of(blocks)

    def _scale(self, c: float | Tensor) -> BaseLinearOperator:
        return self._map(lambda b: b._scale(c))

    def _diagonal(self) -> Tensor:
        return self._entries(lambda b: b._diagonal())

    def _trace(self) -> Tensor:
        return self._numbers(lambda b: b._trace()).sum()

    def _logdet(self) -> Tensor:
        return self._numbers(lambda b: b._logdet()).sum()

    def _norm(self, ord: Any) -> Tensor:
        norms = self._numbers(lambda b: b._norm(ord))
        if ord == "fro":
            return cast(Tensor, torch.linalg.vector_norm(norms))
        if ord == "nuc":
            return norms.sum()
        return norms.max() if ord == 2 else norms.min()

    def _inverse(self) -> BaseLinearOperator:
        return self._map(lambda b: b._inverse())

    def _power(self, p: float) -> BaseLinearOperator:
        return self._map(lambda b: b._power(p))

    def _pinv(self, rcond: float | None) -> BaseLinearOperator:
        if rcond is None:
            return self._map(lambda b: b._pinv(None))
        with torch.no_grad():
            sizes = [float(b._norm(2)) for b in self.members]
        limit = rcond * max(sizes)  # of the whole matrix
        blocks = []
        for size, (name, _, block) in zip(sizes, self.parts, strict=True):
            with _named(name):
                blocks.append(block._pinv(limit / size if size else 1.0))
        return self._of(blocks)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        placed: list[tuple[int, Tensor]] = []
        for name, layout, block in self.parts:
            with _named(name):
                placed += layout.scatter(block._draw(n, generator))
        return assemble(placed)

    def _eigensystem(self) -> tuple[Tensor, BaseLinearOperator]:
        values: list[tuple[int, Tensor]] = []
        bases = []
        for name, layout, block in self.parts:
            with _named(name):
                own, basis = block._eigensystem()
            values += layout.scatter(own.unsqueeze(-1))
            bases.append(basis)
        return assemble(values).squeeze(-1), self._of(bases)

    def _dense(self) -> Tensor:
        dense: Tensor = torch.block_diag(*(b._dense() for b in self.members))
        where = torch.cat([layout.positions() for layout in self.layouts]).to(self.device)
        back = where.argsort()
        return dense[back[:, None], back[None, :]]

    def _restrict(self, names: tuple[str, ...]) -> BaseLinearOperator:
        space = self.space
        if space is None or names == space.names:
            return self
        info = self.info.restrict(names)
        smaller = cast(Any, info.space)
        moves = {}  # of pieces, some of which begin inside of a parameter
        for piece in (piece for layout in self.layouts for piece in layout.pieces):
            if (name := space.holding(piece.start)) in smaller.slices:
                moved = smaller.slices[name].start - space.slices[name].start
                moves[piece.start] = piece.start + moved
        blocks, layouts, kept = [], [], []
        for name, layout, block in self.parts:
            pieces = [piece for piece in layout.pieces if piece.start in moves]
            if not pieces:
                continue
            if len(pieces) < len(layout.pieces):
                block = _piece(block, layout, set(moves))
            chosen = Layout(layout.groups, layout.rows, tuple(pieces))
            blocks.append(block)
            layouts.append(chosen.shifted(moves))
            kept.append(name)
        return BlockDiagonalLinearOperator(*blocks, info=info, names=kept, layouts=layouts)

    def _principal(self, index: Tensor, columns: Tensor | None, info: Info) -> BaseLinearOperator:
        restricted: BaseLinearOperator = rules.selections(self, index, None, info)
        return restricted

    def _kind(self) -> str:
        return f"block diagonal ({', '.join(block._kind() for block in self.members)})"


@rules.sums.register(BlockDiagonalLinearOperator, BlockDiagonalLinearOperator)
def _(A: BlockDiagonalLinearOperator, B: BlockDiagonalLinearOperator, info: Info) -> Any:
    return A._joined(B, lambda a, b: a + b, info)


@rules.products.register(BlockDiagonalLinearOperator, BlockDiagonalLinearOperator)
def _(A: BlockDiagonalLinearOperator, B: BlockDiagonalLinearOperator, info: Info) -> Any:
    return A._joined(B, lambda a, b: a @ b, info)


def _contiguous(members: tuple[BaseLinearOperator, ...]) -> tuple[Layout, ...]:
    layouts, start = [], 0
    for member in members:
        if not member.is_square or member.dim() != 2:
            raise ValueError(f"expected square blocks, got one of shape {tuple(member.shape)}")
        layouts.append(Layout.flat([slice(start, start + member.shape[-1])]))
        start += member.shape[-1]
    return tuple(layouts)


def _piece(block: BaseLinearOperator, layout: Layout, starts: set[int]) -> BaseLinearOperator:
    """The part of a block that belongs to some of its parameters: columns of its grid."""
    chosen, start = [], 0
    for piece in layout.pieces:
        if piece.start in starts:
            chosen.append(torch.arange(start, start + piece.width, device=block.device))
        start += piece.width
    columns = torch.cat(chosen)
    rows = torch.arange(layout.groups * layout.rows, device=block.device)
    index = (rows[:, None] * layout.width + columns[None, :]).reshape(-1)
    return block._principal(index, columns, Info())


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors about numbers say in which block they arose."""
    try:
        yield
    except (NotPositiveDefiniteError, NonFiniteError) as error:
        raise type(error)(f"block {name!r}: {error}") from error
