"""The matrix itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from ..facts import Facts
from ..operators import BaseLinearOperator, DenseLinearOperator, MatrixLinearOperator
from ..quantities import MatrixKind
from ..sweep import Sweep
from .implicit import Implicit
from .recipes import Block, Recipe, info_of, moment_blocks, require_finite, whole
from .representation import Streamed
from .row_stack import RowStack

__all__ = ["Dense"]


@dataclass(frozen=True)
class Dense(Streamed):
    """The P x P matrix itself. Memory P^2; for small models and for reference.

    Example:
        >>> import torch, nngeo_lazy as ng
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
        >>> F = ng.FIM(model, x, Dense(), likelihood="gaussian")
        >>> F.shape, type(F).__name__
        (torch.Size([8, 8]), 'DenseLinearOperator')
    """

    matrices: ClassVar[frozenset[MatrixKind]] = frozenset(MatrixKind)

    def recipe(self, facts: Facts, indices: Sequence[int]) -> Recipe:
        """One block of all parts."""
        return (yield from moment_blocks(facts, [indices]))

    def finish(self, facts: Facts, blocks: Sequence[Block]) -> BaseLinearOperator:
        """The one block, in flat order."""
        return whole(facts, blocks[0])

    def build(self, sweep: Sweep) -> BaseLinearOperator:
        """The matrix: a Jacobian from its rows, a Hessian from its products with unit vectors."""
        kind = sweep.problem.quantity.kind
        if kind is MatrixKind.JACOBIAN:
            return self._rows(sweep)
        if kind is MatrixKind.HESSIAN:
            return self._hessian(sweep)
        return super().build(sweep)

    def _rows(self, sweep: Sweep) -> BaseLinearOperator:
        facts, (stack,) = sweep.run(lambda f: [RowStack(range(len(f.parts)), f.parts)])
        rows = cast(RowStack, stack).rows(facts).flatten(0, 1)
        require_finite(rows, "the network")
        return MatrixLinearOperator(rows, info=info_of(facts, []))

    def _hessian(self, sweep: Sweep) -> BaseLinearOperator:
        H = Implicit().build(sweep)
        matrix = H.to_dense()
        return DenseLinearOperator((matrix + matrix.mT) / 2, info=self.sign(H.info))
