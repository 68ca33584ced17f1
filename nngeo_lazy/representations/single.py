"""One representation for all parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import DataError, SpaceMismatchError
from ..jacobian.parts import Part
from ..operators import (
    BaseLinearOperator,
    BlockDiagonalLinearOperator,
    DiagonalLinearOperator,
    EigenKroneckerLinearOperator,
    KroneckerLinearOperator,
    LowRankLinearOperator,
)
from ..statistics import KroneckerFactors, RowStack, RowSum, SquareSum, Statistic, Sweep
from .base import Representation
from .recipes import (
    Block,
    Recipe,
    block_diagonal,
    block_name,
    by_owner,
    centered,
    diagonal_block,
    flat_layout,
    info_of,
    kronecker_block,
    moment_blocks,
    quasi_diagonal_block,
    require_finite,
    together,
    whole,
)

__all__ = ["EKFAC", "KFAC", "BlockDiagonal", "Dense", "Diagonal", "LowRank", "QuasiDiagonal"]


@dataclass(frozen=True)
class Dense(Representation):
    """The P x P matrix itself. Memory P^2; for small models and for reference."""

    def recipe(self, sweep: Sweep, indices: Sequence[int]) -> Recipe:
        (block,) = yield from moment_blocks(sweep, [indices])
        return [block]

    def finish(self, sweep: Sweep, blocks: Sequence[Block]) -> BaseLinearOperator:
        return whole(sweep, blocks[0])


@dataclass(frozen=True)
class BlockDiagonal(Representation):
    """A dense block for each module that owns parameters. Memory sum of p_l^2."""

    def recipe(self, sweep: Sweep, indices: Sequence[int]) -> Recipe:
        groups = by_owner(sweep, indices).values()
        blocks = yield from moment_blocks(sweep, list(groups))
        return blocks


@dataclass(frozen=True)
class Diagonal(Representation):
    """The diagonal. Memory P."""

    def recipe(self, sweep: Sweep, indices: Sequence[int]) -> Recipe:
        return (yield from together([diagonal_block(sweep, k) for k in indices]))

    def finish(self, sweep: Sweep, blocks: Sequence[Block]) -> BaseLinearOperator:
        diagonal = block_diagonal(sweep, blocks).diagonal()
        return DiagonalLinearOperator(diagonal, info=info_of(sweep, blocks))


@dataclass(frozen=True)
class QuasiDiagonal(Representation):
    """The diagonal, with each output's weights coupled to its bias (Ollivier 2015, section 2.3).

    For each output row diag(F_kk - F_k0^2 / F_00) + f_0 f_0^T / F_00: the matrix's diagonal and
    bias row, completed to a positive semidefinite one. What has no bias is diagonal. Memory 2 P.
    """

    def recipe(self, sweep: Sweep, indices: Sequence[int]) -> Recipe:
        return (yield from together([quasi_diagonal_block(sweep, k) for k in indices]))


@dataclass(frozen=True)
class KFAC(Representation):
    """Kronecker-factored blocks, G kron A for each weight (with its bias).

    Martens and Grosse (2015), Grosse and Martens (2016) for convolutions; weight sharing as in
    Eschenhagen et al. (2023): `expand` treats positions as examples and is exact for deep linear
    networks with a loss for each position, `reduce` sums over them first and is exact where the
    positions are averaged. What has no Kronecker form gets a diagonal block; the report says so.
    Memory o^2 + (i + 1)^2 for a weight (o, i).

    Args:
        sharing: "expand" or "reduce".

    Raises:
        DataError: another sharing.

    Example:
        >>> KFAC(sharing="reduce")
        KFAC(sharing='reduce')
    """

    sharing: str = "expand"

    def __post_init__(self) -> None:
        _check_sharing(self.sharing)

    def check(self, sweep: Sweep) -> None:
        if sweep.center:
            raise DataError(
                "KFAC has no centered form (the mean gradient is no Kronecker product): take "
                "'ekfac', 'diagonal', 'block_diagonal', 'dense' or 'low_rank' with center=True"
            )

    def recipe(self, sweep: Sweep, indices: Sequence[int]) -> Recipe:
        return (yield from together([kronecker_block(sweep, k, self.sharing) for k in indices]))


@dataclass(frozen=True)
class EKFAC(Representation):
    """KFAC's eigenbasis with the best diagonal in it (George et al. 2018). Two passes.

    Memory as KFAC, and p more.

    Args:
        sharing: of the KFAC whose eigenbasis is taken, "expand" or "reduce".
        basis: a KFAC or EKFAC of the same parameters whose eigenbasis is taken instead; one pass.

    Example:
        >>> import nngeo_lazy as ng
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
        >>> E = ng.FIM(model, x, "ekfac", likelihood="gaussian")
        >>> fresh = ng.FIM(model, torch.randn(8, 3), EKFAC(basis=E), likelihood="gaussian")
        >>> type(E.lerp(fresh, 0.1).members[0]).__name__  # a running average keeps the form
        'EigenKroneckerLinearOperator'
    """

    sharing: str = "expand"
    basis: BaseLinearOperator | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_sharing(self.sharing)
        if self.basis is not None and not isinstance(self.basis, BlockDiagonalLinearOperator):
            raise DataError(
                f"expected basis= to be a KFAC or an EKFAC Fisher, got {type(self.basis).__name__}"
            )

    @property
    def passes(self) -> int:
        return 2 if self.basis is None else 1

    def check(self, sweep: Sweep) -> None:
        if self.basis is not None and self.basis.space != sweep.space:
            raise SpaceMismatchError(
                f"basis= is over {self.basis.space}, not over the model's {sweep.space}: build "
                "both with the same params="
            )

    def recipe(self, sweep: Sweep, indices: Sequence[int]) -> Recipe:
        return (yield from together([self._block(sweep, k) for k in indices]))

    def outline(self, sweep: Sweep, indices: Sequence[int]) -> list[Sequence[Statistic]]:
        first = list(next(self.recipe(sweep, indices)))
        if self.basis is not None:
            return [first]
        second = []
        for factors in first:
            if isinstance(factors, KroneckerFactors):
                (k,) = factors.indices
                part = sweep.parts[k]
                sizes = (part.layout.groups, part.layout.rows, part.layout.width)
                unknown = (torch.empty(sizes[0], n, n, device="meta") for n in sizes[1:])
                second.append(SquareSum(k, part, *unknown))
        return [first, second]

    def _block(self, sweep: Sweep, k: int) -> Recipe:
        part = sweep.parts[k]
        given = None if self.basis is None else self._bases(sweep, part)
        if given is None and (self.basis is not None or part.kind != "outer"):
            return (yield from diagonal_block(sweep, k))
        positions = None
        if given is None:
            (block,) = yield from kronecker_block(sweep, k, self.sharing)
            require_finite(block.operator, block_name(sweep, [k]))  # before it is decomposed
            given, positions = block.operator.bases(), block.positions
        squares, sums = SquareSum(k, part, *given), RowSum(k, part)
        yield [squares, sums] if sweep.center else [squares]
        values = squares.diagonal(sweep)
        grid = (part.layout.groups, part.layout.rows, part.layout.width)
        eigen = EigenKroneckerLinearOperator(values.view(grid), *given)
        if sweep.center:
            values = centered(values, eigen.rotate(sums.mean(sweep).unsqueeze(-1)).squeeze(-1))
            eigen = EigenKroneckerLinearOperator(values.view(grid), *given)
        return [Block((k,), part.layout, eigen, positions)]

    def _bases(self, sweep: Sweep, part: Part) -> tuple[Tensor, Tensor] | None:
        """The eigenbasis that the given operator has for a part, None where it is diagonal."""
        for _, layout, block in self.basis.parts:  # type: ignore[union-attr]
            if layout == part.layout:
                if isinstance(block, (KroneckerLinearOperator, EigenKroneckerLinearOperator)):
                    left, right = block.bases()
                    where = sweep.space.device, sweep.dtype
                    return left.to(*where), right.to(*where)
                return None
        raise SpaceMismatchError(
            f"basis= has no block for {', '.join(part.names)}: build it with 'kfac' or 'ekfac' "
            "from the same model"
        )


@dataclass(frozen=True)
class LowRank(Representation):
    """U U^T from the rows themselves: exact, of rank at most (examples x directions).

    U holds the rows of all examples, divided by the root of their number, or with a `rank` the best
    approximation of that rank (the truncated singular value decomposition: Eckart and Young 1936).
    Exact estimators have one row for each output direction of each example: take "mc" or
    "empirical" where there are many. Memory P times the rank.

    Args:
        rank: how many directions to keep; all by default.

    Raises:
        DataError: a rank that is not a positive integer.
    """

    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and (not isinstance(self.rank, int) or self.rank < 1):
            raise DataError(f"expected rank to be a positive integer or None, got {self.rank!r}")

    def recipe(self, sweep: Sweep, indices: Sequence[int]) -> Recipe:
        parts = [sweep.parts[k] for k in indices]
        stack = RowStack(indices, parts, self.rank)
        yield [stack]
        root = stack.stacked(sweep).mT / sweep.denominator**0.5  # (P, K)
        require_finite(root, block_name(sweep, indices))
        wanted = root.shape[0] if self.rank is None else self.rank
        if wanted < root.shape[1]:
            u, s, _ = torch.linalg.svd(root, full_matrices=False)
            root = u[:, :wanted] * s[:wanted]
        return [Block(tuple(indices), flat_layout(sweep, indices), LowRankLinearOperator(root))]

    def finish(self, sweep: Sweep, blocks: Sequence[Block]) -> BaseLinearOperator:
        return whole(sweep, blocks[0])


def _check_sharing(sharing: str) -> None:
    if sharing not in ("expand", "reduce"):
        raise DataError(f"expected sharing='expand' or 'reduce', got {sharing!r}")
