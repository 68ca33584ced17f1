"""A block-diagonal matrix over named, unequal blocks of any kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeGuard, TypeVar, cast

import torch
from torch import Tensor

from ..errors import NonFiniteError, NotPositiveDefiniteError
from ..layout import Layout, assemble
from . import rules
from .base import BaseLinearOperator, Krylov
from .damping import Damping
from .info import Info

__all__ = ["BlockDiagonalLinearOperator"]

Result = TypeVar("Result")


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
        **fields: what else an operator of a subclass is.

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
        **fields: Any,
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
        super().__init__(*members, info=info, names=self.names, layouts=self.layouts, **fields)
        self.members = members

    @property
    def parts(self) -> list[tuple[str, Layout, BaseLinearOperator]]:
        """Name, layout and operator of each block."""
        return list(zip(self.names, self.layouts, self.members, strict=True))

    def same_blocks(self, other: BaseLinearOperator) -> TypeGuard[BlockDiagonalLinearOperator]:
        """Whether another operator is block diagonal over the same coordinates."""
        return isinstance(other, BlockDiagonalLinearOperator) and self.layouts == other.layouts

    # --- maps -----------------------------------------------------------------------------------

    def _each(
        self,
        function: Callable[[int, BaseLinearOperator], Result],
        absent: Callable[[int, BaseLinearOperator], Result],
        *vectors: Tensor,
    ) -> list[Result]:
        """A function of each block; `absent` is it for a block whose numbers another process has.

        Args:
            function: of the block's number and the block.
            absent: zeros in the function's place.
            *vectors: that all processes have.
        """
        found = []
        for k, (name, block) in enumerate(zip(self.names, self.members, strict=True)):
            with _named(name):
                found.append(function(k, block))
        return found

    def _summed(self, own: Tensor) -> Tensor:
        """The sum over the processes that have blocks."""
        return own

    def _zeros(self, block: BaseLinearOperator, shape: torch.Size, *links: Tensor) -> Tensor:
        """Zeros in the place of a block's numbers, in the graph of all that these depend on."""
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _copied(self, tensor: Tensor) -> Tensor:
        """A tensor that all of these processes have, whose gradient is the sum of theirs."""
        return tensor

    def _columns(
        self, function: Callable[[int, BaseLinearOperator, Tensor], Tensor], v: Tensor
    ) -> Tensor:
        """Each block's coordinates of (..., P, k), through a function, and back."""
        v = self._copied(v)

        def through(k: int, block: BaseLinearOperator) -> list[tuple[int, Tensor]]:
            layout = self.layouts[k]
            return layout.scatter(function(k, block, layout.gather(v)))

        def zeros(k: int, block: BaseLinearOperator) -> list[tuple[int, Tensor]]:
            layout = self.layouts[k]
            return layout.scatter(self._zeros(block, layout.gather(v).shape, v))

        placed = self._each(through, zeros, v)
        return self._summed(assemble([part for parts in placed for part in parts]))

    def _entries(self, function: Callable[[BaseLinearOperator], Tensor]) -> Tensor:
        """A vector (p,) of each block, as one (P,)."""

        def zeros(k: int, block: BaseLinearOperator) -> Tensor:
            return self._zeros(block, block.shape[-1:])

        return self._placed(self._each(lambda k, b: function(b), zeros))

    def _placed(self, entries: Iterable[Tensor]) -> Tensor:
        """Vectors (p,) of all blocks, as one (P,)."""
        pairs = zip(self.layouts, entries, strict=True)
        placed = [part for layout, own in pairs for part in layout.scatter(own.unsqueeze(-1))]
        return self._summed(assemble(placed)).squeeze(-1)

    def _numbers(self, function: Callable[[BaseLinearOperator], Tensor]) -> Tensor:
        """A number of each block, stacked."""

        def zero(k: int, block: BaseLinearOperator) -> Tensor:
            return self._zeros(block, torch.Size(()))

        return self._summed(torch.stack(self._each(lambda k, b: function(b), zero)))

    def _map(
        self, function: Callable[[int, BaseLinearOperator], BaseLinearOperator]
    ) -> BlockDiagonalLinearOperator:
        """An operator of each block."""
        return self._of(self._each(function, function))

    def _of(
        self, blocks: Iterable[BaseLinearOperator], info: Info | None = None
    ) -> BlockDiagonalLinearOperator:
        """Other blocks in the same coordinates."""
        made = self.__class__(*blocks, **self._kwargs)
        return made if info is None else cast(BlockDiagonalLinearOperator, made._with_info(info))

    def _joined(
        self, other: BlockDiagonalLinearOperator, function: Callable[[Any, Any], Any], info: Info
    ) -> Any:
        """A function of each pair of blocks, if both have the same ones."""
        if not self.same_blocks(other):
            return NotImplemented

        def both(k: int, a: BaseLinearOperator) -> BaseLinearOperator:
            return cast(BaseLinearOperator, function(a, other.members[k]))

        return self._of(self._each(both, lambda k, a: a), info)

    # --- primitives -----------------------------------------------------------------------------

    @property
    def is_explicit(self) -> bool:
        """Whether all blocks' entries are known without products."""
        return all(member.is_explicit for member in self.members)

    def _size(self) -> torch.Size:
        size = sum(layout.size for layout in self.layouts)
        return torch.Size((size, size))

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        return self._map(lambda k, b: cast(BaseLinearOperator, b._transpose_nonbatch()))

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
        tensors = (damping.value, *(constant for _, constant in damping.constants))
        copies = {id(t): self._copied(t) for t in tensors}  # one constant stays one object
        constants = tuple((where, copies[id(c)]) for where, c in damping.constants)
        damping = replace(damping, value=copies[id(damping.value)], constants=constants)
        own = [replace(damping, value=damping.on(layout), constants=()) for layout in self.layouts]
        return self._map(lambda k, b: b._damp(own[k], method))

    def _scale(self, c: float | Tensor) -> BaseLinearOperator:
        c = self._copied(c) if isinstance(c, Tensor) else c
        return self._map(lambda k, b: b._scale(c))

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
        return self._map(lambda k, b: b._inverse())

    def _power(self, p: float) -> BaseLinearOperator:
        return self._map(lambda k, b: b._power(p))

    def _pinv(self, rcond: float | None) -> BaseLinearOperator:
        if rcond is None:
            return self._map(lambda k, b: b._pinv(None))
        with torch.no_grad():
            sizes = self._numbers(lambda b: b._norm(2)).tolist()
        limit = rcond * max(sizes)  # of the whole matrix
        return self._map(lambda k, b: b._pinv(limit / sizes[k] if sizes[k] else 1.0))

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        generators = self._generators(generator)

        def zeros(k: int, block: BaseLinearOperator) -> Tensor:
            return self._zeros(block, torch.Size((block.shape[-1], n)))

        draws = self._each(lambda k, b: b._draw(n, generators[k]), zeros)
        pairs = zip(self.layouts, draws, strict=True)
        return self._summed(
            assemble([part for layout, own in pairs for part in layout.scatter(own)])
        )

    def _generators(self, generator: torch.Generator | None) -> list[torch.Generator | None]:
        """Of each block's draws."""
        return [generator] * len(self.members)

    def _eigensystem(self) -> tuple[Tensor, BaseLinearOperator]:
        def zeros(k: int, block: BaseLinearOperator) -> tuple[Tensor, BaseLinearOperator]:
            return self._zeros(block, block.shape[-1:]), block

        found = self._each(lambda k, b: b._eigensystem(), zeros)
        return self._placed([values for values, _ in found]), self._of([b for _, b in found])

    def _dense(self) -> Tensor:
        def zeros(k: int, block: BaseLinearOperator) -> Tensor:
            return self._zeros(block, block.shape)

        dense: Tensor = torch.block_diag(*self._each(lambda k, b: b._dense(), zeros))
        where = torch.cat([layout.positions() for layout in self.layouts]).to(self.device)
        back = where.argsort()
        return self._summed(dense[back[:, None], back[None, :]])

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
        fields = {**self._kwargs, "info": info, "names": kept, "layouts": layouts}
        return self.__class__(*blocks, **fields)

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
