"""A representation whose blocks are shared out over the processes that share the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..arguments import check_fields
from ..collectives import in_processes, owners
from ..errors import DataError
from ..facts import Facts
from ..operators import BaseLinearOperator, BlockDiagonalLinearOperator
from ..operators.report import nbytes
from ..operators.sharded import shared_out
from .around import Around
from .mixed import resolve
from .recipes import Block
from .representation import Streamed

__all__ = ["Sharded"]


@dataclass(frozen=True)
class Sharded(Around):
    """Each block on one of the processes that share the data: about 1/W of the memory on each.

    The matrix is that of `representation`. All processes call each of its members, with the same
    vectors, and have the same results; a product or a solve exchanges one vector. The build itself
    needs what a replicated one needs: every process sees examples of all layers. In one
    process it is `representation`.

    Args:
        representation: one that has blocks, such as "kfac", "ekfac", "block_diagonal" or a `Mixed`.

    Raises:
        DataError: the representation is one matrix without blocks; torch.distributed runs, but the
            data are not `ng.Distributed`.

    Example:
        >>> import torch
        >>> import nngeo_lazy as ng
        >>> model = torch.nn.Linear(3, 2)
        >>> F = ng.FIM(model, torch.randn(8, 3), Sharded("ekfac"), likelihood="gaussian")
        >>> F.solve(torch.ones(8), damping=1.0).shape  # in many processes: on all of them
        torch.Size([8])

    Source: one owner for each block is MEM-OPT of KAISA (Pauloski et al. 2021).
    """

    def __post_init__(self) -> None:
        check_fields(self)
        known = resolve(self.representation)
        if not isinstance(known, Streamed) or type(known).finish is not Streamed.finish:
            raise DataError(
                f"expected a representation that has blocks to share out, got {known!r}, "
                "which is one matrix: take 'kfac', 'ekfac', 'block_diagonal', 'quasi_diagonal' or "
                "a Mixed of them"
            )

    @property
    def shares_blocks(self) -> bool:
        """Whether each process keeps some blocks alone."""
        return True

    def require_fit(self, facts: Facts) -> None:
        """Refuse data that say nothing of processes, and what the representation refuses."""
        if facts.group.size == 1 and in_processes():
            raise DataError(
                "Sharded shares out blocks over the processes that share the data, and the data "
                "are a plain loader: pass ng.Distributed(loader)"
            )
        super().require_fit(facts)

    def finish(self, facts: Facts, blocks: Sequence[Block]) -> BaseLinearOperator:
        """The operator of this process's blocks."""
        whole = self._inner.finish(facts, blocks)
        if facts.group.size == 1 or not isinstance(whole, BlockDiagonalLinearOperator):
            return whole
        sizes = [float(nbytes(block)) for block in whole.members]
        return shared_out(whole, owners(sizes, facts.group.size), facts.group)
