"""One representation for all parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar

import torch
from torch import Tensor

from ..arguments import check_fields
from ..errors import DataError, SpaceMismatchError
from ..facts import Facts
from ..jacobian.parts import Part
from ..operators import (
    BaseLinearOperator,
    BlockDiagonalLinearOperator,
    DiagonalLinearOperator,
    EigenKroneckerLinearOperator,
    KroneckerLinearOperator,
    LowRankLinearOperator,
    ShardedBlockDiagonalLinearOperator,
)
from ..operators.stored import opened
from ..sides import Shape, Wide
from ..statistics import MAX_FACTOR, KroneckerFactors, RowSum, Sharing, SquareSum, Statistic
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
    matrix_of,
    moment_blocks,
    quasi_diagonal_block,
    require_finite,
    shared_bases,
    together,
    whole,
)
from .representation import Blockwise, Streamed
from .row_stack import RowStack

__all__ = ["EKFAC", "KFAC", "BlockDiagonal", "Diagonal", "LowRank", "QuasiDiagonal"]


@dataclass(frozen=True)
class BlockDiagonal(Streamed):
    """A dense block for each module that owns parameters. Memory sum of p_l^2.

    Example:
        >>> import torch, nngeo_lazy as ng
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
        >>> F = ng.FIM(model, x, BlockDiagonal(), likelihood="gaussian")
        >>> [block.shape for block in F.members]
        [torch.Size([8, 8])]
    """

    def recipe(self, facts: Facts, indices: Sequence[int]) -> Recipe:
        """A second moment for each module."""
        groups = by_owner(facts, indices).values()
        blocks = yield from moment_blocks(facts, list(groups))
        return blocks


@dataclass(frozen=True)
class Diagonal(Blockwise):
    """The diagonal. Memory P.

    Example:
        >>> import torch, nngeo_lazy as ng
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
        >>> F = ng.FIM(model, x, Diagonal(), likelihood="gaussian")
        >>> bool((F.diagonal() >= 0).all())
        True
    """

    def block(self, facts: Facts, k: int) -> Recipe:
        """Squared rows."""
        return diagonal_block(facts, k)

    def finish(self, facts: Facts, blocks: Sequence[Block]) -> BaseLinearOperator:
        """One diagonal of all parameters."""
        diagonal = block_diagonal(facts, blocks).diagonal()
        return DiagonalLinearOperator(diagonal, info=info_of(facts, blocks))


@dataclass(frozen=True)
class QuasiDiagonal(Blockwise):
    """The diagonal, with each output's weights coupled to its bias (Ollivier 2015, section 2.3).

    For each output row diag(F_kk - F_k0^2 / F_00) + f_0 f_0^T / F_00: the matrix's diagonal and
    bias row, completed to a positive semidefinite one. What has no bias is diagonal. Memory 2 P.

    Example:
        >>> import torch, nngeo_lazy as ng
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
        >>> F = ng.FIM(model, x, QuasiDiagonal(), likelihood="gaussian")
        >>> exact = ng.FIM(model, x, "dense", likelihood="gaussian")
        >>> torch.testing.assert_close(F.diagonal(), exact.diagonal())
    """

    def block(self, facts: Facts, k: int) -> Recipe:
        """Squared rows and couplings."""
        return quasi_diagonal_block(facts, k)


@dataclass(frozen=True)
class KFAC(Blockwise):
    """Kronecker-factored blocks, G kron A for each weight (with its bias).

    Martens and Grosse (2015), Grosse and Martens (2016) for convolutions; weight sharing as in
    Eschenhagen et al. (2023). `expand` treats positions as examples and is exact for deep linear
    networks with a loss for each position. `reduce` sums over them first and is exact if the
    positions are averaged. What has no Kronecker form gets a diagonal block; the report says so.
    Memory o^2 + (i + 1)^2 for a weight (o, i).

    Args:
        sharing: "expand" or "reduce".
        separate_bias: whether a weight and its bias have no covariance.
        max_factor: a factor of more rows is wide, such as the one of a vocabulary.
        wide: what is kept of a wide factor. "diagonal": its diagonal. "split": diagonal blocks of
            max_factor rows at most, of one size but for the last (Grosse et al. 2023, Studying
            large language model generalization with influence functions, appendix A).
            "low_rank": U U^T + c I, with the Nystrom approximation of rank min(256, max_factor)
            and the mean c of what it leaves of the trace (Frangella, Tropp and Udell 2021). The
            histogram of an embedding's inputs is diagonal as it is.
        tied: what a matrix gets that is used in both layouts, such as an embedding that is the
            head, too: its exact "diagonal", or one "kronecker" product of all uses. That product
            has the partial traces of the sum of the uses' blocks. It cannot be merged.
        forward_only: whether G is the identity, so that only inputs count (FOOF: Benzing 2022,
            Gradient descent on neurons and its link to approximate second-order optimization).

    Raises:
        DataError: another sharing, tied or wide, a max_factor that is no positive integer, or
            options that exclude each other: "low_rank" has no entries that separate_bias could set
            to zero, and tied="kronecker" keeps wide factors diagonal.

    Example:
        >>> KFAC(sharing="reduce")
        KFAC(sharing='reduce')
    """

    sharing: str = "expand"
    separate_bias: bool = field(default=False, repr=False)
    max_factor: int = field(default=MAX_FACTOR, repr=False)
    wide: str = field(default="diagonal", repr=False)
    tied: str = field(default="diagonal", repr=False)
    forward_only: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        check_fields(self)
        _require_factors(self)

    def described(self) -> str:
        """With other options only if they are not the defaults."""
        return _with_options(self)

    def require_fit(self, facts: Facts) -> None:
        """Refuse centering, which is no Kronecker product."""
        if facts.center:
            raise DataError(
                "KFAC has no centered form (the mean gradient is no Kronecker product): take "
                "'ekfac', 'diagonal', 'block_diagonal', 'dense' or 'low_rank' with center=True"
            )

    def block(self, facts: Facts, k: int) -> Recipe:
        """Kronecker factors."""
        return kronecker_block(
            facts,
            k,
            Sharing(self.sharing),
            self.max_factor,
            Wide(self.wide),
            separate_bias=self.separate_bias,
            forward_only=self.forward_only,
            tied=self.tied,
        )


@dataclass(frozen=True)
class EKFAC(Streamed):
    """KFAC's eigenbasis with the best diagonal in it (George et al. 2018). Two passes.

    Memory as KFAC, and p more.

    Args:
        sharing: of the KFAC whose eigenbasis is taken, "expand" or "reduce".
        basis: a KFAC or EKFAC of the same parameters whose eigenbasis is taken instead; one pass.
        separate_bias: as in KFAC.
        max_factor: as in KFAC. A factor that is kept diagonal has the identity as its eigenbasis.
        wide: as in KFAC. The eigenbasis of a factor of low rank is a product of reflections, and
            has one eigenvalue for each of its vectors, within the rank or not.
        tied: as in KFAC.

    Raises:
        DataError: as KFAC does, or a basis that is none.

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
    separate_bias: bool = field(default=False, repr=False)
    max_factor: int = field(default=MAX_FACTOR, repr=False)
    wide: str = field(default="diagonal", repr=False)
    tied: str = field(default="diagonal", repr=False)

    def __post_init__(self) -> None:
        check_fields(self)
        _require_factors(self)
        if self.basis is not None and not isinstance(self.basis, BlockDiagonalLinearOperator):
            raise DataError(
                f"expected basis= to be a KFAC or an EKFAC Fisher, got {type(self.basis).__name__}"
            )
        if isinstance(self.basis, ShardedBlockDiagonalLinearOperator):
            raise DataError(
                "the eigenbasis of a sharded operator lies in pieces on several processes: build "
                "EKFAC() anew, or pass a basis= that is not sharded"
            )

    def described(self) -> str:
        """With other options only if they are not the defaults."""
        return _with_options(self)

    @property
    def kfac(self) -> KFAC:
        """The KFAC whose eigenbasis is taken if none is given."""
        return KFAC(
            self.sharing,
            separate_bias=self.separate_bias,
            max_factor=self.max_factor,
            wide=self.wide,
            tied=self.tied,
        )

    @property
    def passes(self) -> int:
        """Two, or one in a given basis."""
        return 2 if self.basis is None else 1

    def require_fit(self, facts: Facts) -> None:
        """Refuse a basis over other parameters."""
        if self.basis is not None and self.basis.space != facts.space:
            raise SpaceMismatchError(
                f"basis= is over {self.basis.space}, not over the model's {facts.space}: build "
                "both with the same params="
            )

    def recipe(self, facts: Facts, indices: Sequence[int]) -> Recipe:
        """Kronecker factors, and in a second pass squared rows in their eigenbasis."""
        if self.basis is not None:
            recipes = [self._in(facts, k, self._bases(facts, facts.parts[k])) for k in indices]
            return (yield from together(recipes))
        blocks = yield from self.kfac.recipe(facts, indices)
        known, done = _decomposed(facts, blocks)
        if not known:
            return done
        recipes = [self._in(facts, k, *each) for k, each in known.items()]
        del known  # bases are large, and live on in one place only
        more = yield from together(recipes)
        return sorted([*done, *more], key=lambda block: block.indices)

    def outline(self, facts: Facts, indices: Sequence[int]) -> list[Sequence[Statistic]]:
        """The second pass in a basis of which only the sizes are known."""
        first = list(next(self.recipe(facts, indices)))
        if self.basis is not None:
            return [first]
        second = []
        for k in dict.fromkeys(f.indices[0] for f in first if isinstance(f, KroneckerFactors)):
            part = matrix_of(facts.parts[k])
            sides = part.layout.rows, part.layout.width
            shapes = (Shape.of(n, self.max_factor, Wide(self.wide)) for n in sides)
            unknown = (torch.empty((part.layout.groups, *s.basis), device="meta") for s in shapes)
            second.append(SquareSum(k, part, *unknown))
        return [first, second]

    def _in(
        self,
        facts: Facts,
        k: int,
        given: tuple[Tensor, Tensor] | None,
        positions: int | None = None,
        note: str | None = None,
    ) -> Recipe:
        """The best diagonal in a given basis."""
        if given is None:
            return (yield from diagonal_block(facts, k))
        part = matrix_of(facts.parts[k])
        squares, sums = SquareSum(k, part, *given), RowSum(k, part)
        facts = yield [squares, sums] if facts.center else [squares]
        values = squares.diagonal(facts)
        grid = (part.layout.groups, part.layout.rows, part.layout.width)
        eigen = EigenKroneckerLinearOperator(values.view(grid), *given)
        if facts.center:
            values = centered(values, eigen.rotate(sums.mean(facts).mT).mT)
            eigen = EigenKroneckerLinearOperator(values.view(grid), *given)
        return [Block((k,), part.layout, eigen, positions, note)]

    def _bases(self, facts: Facts, part: Part) -> tuple[Tensor, Tensor] | None:
        """The eigenbasis that the given operator has for a part, None if it is diagonal."""
        for _, layout, member in self.basis.parts:  # type: ignore[union-attr]
            if layout in (part.layout, matrix_of(part).layout):
                block = opened(member)
                if isinstance(block, (KroneckerLinearOperator, EigenKroneckerLinearOperator)):
                    left, right = block.bases()
                    where = facts.space.device, facts.dtype
                    return left.to(*where), right.to(*where)
                return None
        raise SpaceMismatchError(
            f"basis= has no block for {', '.join(part.names)}: build it with 'kfac' or 'ekfac' "
            "from the same model"
        )


@dataclass(frozen=True)
class LowRank(Streamed):
    """U U^T from the rows themselves: exact, of rank at most (examples x directions).

    U holds the rows of all examples, divided by the root of their number. With a `rank` it is the
    best approximation of that rank (the truncated singular value decomposition: Eckart and Young
    1936). Exact estimators have one row for each output direction of each example: take "mc" or
    "empirical" if there are many. Memory P times the rank.

    Args:
        rank: how many directions to keep; all by default.

    Raises:
        DataError: a rank that is not a positive integer.

    Example:
        >>> import torch, nngeo_lazy as ng
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
        >>> F = ng.FIM(model, x, LowRank(rank=4), likelihood="gaussian")
        >>> int(torch.linalg.matrix_rank(F.to_dense()))
        4
    """

    averages: ClassVar[bool] = False

    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and (not isinstance(self.rank, int) or self.rank < 1):
            raise DataError(f"expected rank to be a positive integer or None, got {self.rank!r}")
        check_fields(self)

    @property
    def truncates(self) -> bool:
        """If it has a rank."""
        return self.rank is not None

    def recipe(self, facts: Facts, indices: Sequence[int]) -> Recipe:
        """The rows of all parts."""
        parts = [facts.parts[k] for k in indices]
        stack = RowStack(indices, parts, self.rank)
        facts = yield [stack]
        root = stack.stacked(facts).mT / facts.denominator**0.5  # (P, K)
        require_finite(root, block_name(facts, indices))
        wanted = root.shape[0] if self.rank is None else self.rank
        if wanted < root.shape[1]:
            u, s, _ = torch.linalg.svd(root, full_matrices=False)
            root = u[:, :wanted] * s[:wanted]
        return [Block(tuple(indices), flat_layout(facts, indices), LowRankLinearOperator(root))]

    def finish(self, facts: Facts, blocks: Sequence[Block]) -> BaseLinearOperator:
        """The one block, in flat order."""
        return whole(facts, blocks[0])


def _decomposed(
    facts: Facts, blocks: list[Block]
) -> tuple[dict[int, tuple[tuple[Tensor, Tensor], int | None, str | None]], list[Block]]:
    """The eigenbases, positions and notes of Kronecker blocks by part, and the other blocks.

    The list is emptied, so that each block's factors go when its bases are there.
    """
    found: list[tuple[Block, KroneckerLinearOperator]] = []
    done: list[Block] = []
    while blocks:
        block = blocks.pop(0)
        if isinstance(block.operator, KroneckerLinearOperator):
            require_finite(block.operator, block_name(facts, block.indices))
            found.append((block, block.operator))
        else:
            done.append(block)
    kept = [(block.indices[0], block.positions, block.note) for block, _ in found]
    factors = [[operator.left, operator.right] for _, operator in found]
    del found, block
    bases = shared_bases(factors, facts.group)
    return {k: (own, n, note) for (k, n, note), own in zip(kept, bases, strict=True)}, done


def _require_factors(options: KFAC | EKFAC) -> None:
    if options.sharing not in list(Sharing):
        raise DataError(
            f"expected sharing='expand' or 'reduce', got {options.sharing!r}; docs/conventions.md "
            "explains them"
        )
    if options.tied not in ("diagonal", "kronecker"):
        raise DataError(
            f"expected tied='diagonal' or 'kronecker', got {options.tied!r}: the exact diagonal of "
            "a tied weight, or one Kronecker product for all of its uses"
        )
    if options.max_factor < 1:
        raise DataError(f"expected max_factor to be a positive integer, got {options.max_factor!r}")
    if options.wide not in list(Wide):
        raise DataError(
            "expected wide='diagonal', 'split' or 'low_rank', which is what is kept of factors of "
            f"more than max_factor rows, got {options.wide!r}"
        )
    if options.separate_bias and options.wide == Wide.LOW_RANK:
        raise DataError(
            "a factor of low rank has no entries that could be set to zero for separate_bias=True: "
            "take wide='split' or 'diagonal' with it"
        )
    if options.tied == "kronecker" and options.wide != Wide.DIAGONAL:
        raise DataError(
            "the factors of uses in both layouts are added, and wide ones stay diagonal: take "
            "wide='diagonal' with tied='kronecker'"
        )


def _with_options(options: KFAC | EKFAC) -> str:
    """As it prints, and the fields that do not print if they are not the defaults."""
    hidden = [f for f in fields(options) if not f.repr and f.name != "basis"]
    given = {f.name: getattr(options, f.name) for f in hidden}
    more = [f", {f.name}={given[f.name]!r}" for f in hidden if given[f.name] != f.default]
    return repr(options)[:-1] + "".join(more) + ")"
