"""The representation axis: how a matrix is stored, and how it is built from forms.

An options object is a recipe: it asks for statistics (plain sums over the data), once for each pass
that it needs, and makes blocks from them at the end. Statistics know forms, operators know algebra,
and neither knows a layer. Recipes run side by side, so that a mixture costs no more passes than its
parts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import DataError, SpaceMismatchError
from .jacobian.plan import Part
from .operators import (
    BaseLinearOperator,
    BlockDiagonalLinearOperator,
    DiagonalLinearOperator,
    EigenKroneckerLinearOperator,
    KroneckerLinearOperator,
    LowRankLinearOperator,
)
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
from .selectors import select
from .space import ParamSpace
from .statistics import KroneckerFactors, Make, RowStack, RowSum, SquareSum, Statistic, Sweep

__all__ = [
    "EKFAC",
    "KFAC",
    "BlockDiagonal",
    "Dense",
    "Diagonal",
    "LowRank",
    "Mixed",
    "QuasiDiagonal",
    "Representation",
    "resolve",
]


class Representation(ABC):
    """What to build; one of the options objects below, or its name in lower case."""

    @property
    def passes(self) -> int:
        """How often the data are read."""
        return 1

    @abstractmethod
    def recipe(self, sweep: Sweep, indices: Sequence[int]) -> Recipe:
        """Yield the statistics of each pass over the data, then return the blocks.

        Args:
            sweep: knows the parts from here on, and behind each pass how many examples there were.
            indices: the parts to represent.
        """

    def outline(self, sweep: Sweep, indices: Sequence[int]) -> list[Sequence[Statistic]]:
        """The statistics of each pass, without a pass: what a plan counts."""
        return [next(self.recipe(sweep, indices))]

    def check(self, sweep: Sweep) -> None:  # noqa: B027 - most have nothing to check
        """Raise where this representation cannot be built, before any pass."""

    def finish(self, sweep: Sweep, blocks: Sequence[Block]) -> BaseLinearOperator:
        """The operator of all blocks."""
        return block_diagonal(sweep, blocks)

    def build(self, sweep: Sweep) -> BaseLinearOperator:
        """The operator, from one or more passes over the data."""
        self.check(sweep)
        recipes: list[Recipe] = []

        def start(parts: Sequence[Part]) -> Sequence[Statistic]:
            recipes.append(self.recipe(sweep, range(len(parts))))
            return next(recipes[0])

        sweep(start, keep=self.passes > 1)
        while True:
            try:
                wanted = next(recipes[0])
            except StopIteration as done:
                return self.finish(sweep, done.value)
            sweep(_always(wanted))


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
        given = None if self.basis is None else self._bases(part)
        if given is None and part.kind != "outer":
            return (yield from diagonal_block(sweep, k))
        positions = None
        if given is None:
            (block,) = yield from kronecker_block(sweep, k, self.sharing)
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

    def _bases(self, part: Part) -> tuple[Tensor, Tensor] | None:
        """The eigenbasis that the given operator has for a part, None where it is diagonal."""
        for _, layout, block in self.basis.parts:  # type: ignore[union-attr]
            if layout == part.layout:
                if isinstance(block, (KroneckerLinearOperator, EigenKroneckerLinearOperator)):
                    return block.bases()
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
        stack = RowStack(indices, parts)
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


@dataclass(frozen=True)
class Mixed(Representation):
    """One representation for each of several groups of parameters, in one build.

    Args:
        default: for the parameters that no selector names; None where there must be none.
        chosen: {selector: representation}; "dense" and "low_rank" make one block of a group.

    Raises:
        SpaceMismatchError: a selector that matches nothing, selectors that overlap, a layer whose
            block they would cut, or parameters that are left out.

    Example:
        >>> import nngeo_lazy as ng
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        >>> mixed = Mixed("kfac", {"1": "dense"})
        >>> F = ng.FIM(model, torch.randn(9, 3), mixed, likelihood="gaussian")
        >>> [block._kind() for block in F.members]
        ['Kronecker (4x4) x (4x4)', 'dense 10x10']
    """

    default: str | Representation | None = "kfac"
    chosen: Mapping[Any, str | Representation] = field(default_factory=dict)

    @property
    def passes(self) -> int:
        given = [self.default] if self.default is not None else []
        return max(resolve(each).passes for each in (*given, *self.chosen.values()))

    def check(self, sweep: Sweep) -> None:
        self._groups(sweep.space)
        given = [] if self.default is None else [self.default]
        for each in (*given, *self.chosen.values()):
            resolve(each).check(sweep)

    def recipe(self, sweep: Sweep, indices: Sequence[int]) -> Recipe:
        recipes = []
        for representation, names in self._groups(sweep.space):
            inside = [k for k in indices if names >= set(sweep.parts[k].names)]
            for k in indices:
                part = set(sweep.parts[k].names)
                if names & part and not names >= part:
                    raise SpaceMismatchError(
                        f"{sorted(part)} have one block, but the selectors of Mixed name only "
                        f"{sorted(names & part)} together: select the whole layer"
                    )
            if inside:
                recipes.append(representation.recipe(sweep, inside))
        return (yield from together(recipes))

    def outline(self, sweep: Sweep, indices: Sequence[int]) -> list[Sequence[Statistic]]:
        passes: list[list[Statistic]] = [[] for _ in range(self.passes)]
        for representation, names in self._groups(sweep.space):
            inside = [k for k in indices if names >= set(sweep.parts[k].names)]
            for own, more in zip(passes, representation.outline(sweep, inside), strict=False):
                own += more
        return list(passes)

    def _groups(self, space: ParamSpace) -> list[tuple[Representation, set[str]]]:
        """Each representation with its parameters."""
        groups: list[tuple[Representation, set[str]]] = []
        left = set(space.names)
        for selector, representation in self.chosen.items():
            names = set(select(space, selector))
            if twice := sorted(names - left):
                raise SpaceMismatchError(
                    f"the selector {selector!r} of Mixed names {twice}, which another one has "
                    "already: make them disjoint"
                )
            left -= names
            groups.append((resolve(representation), names))
        if left and self.default is None:
            missing = [name for name in space.names if name in left]
            raise SpaceMismatchError(
                f"Mixed leaves {missing} without a representation: name them in a selector, or "
                "pass a default"
            )
        if left and self.default is not None:
            groups.append((resolve(self.default), left))
        return groups


NAMES: dict[str, Callable[[], Representation]] = {
    "dense": Dense,
    "block_diagonal": BlockDiagonal,
    "diagonal": Diagonal,
    "quasi_diagonal": QuasiDiagonal,
    "kfac": KFAC,
    "ekfac": EKFAC,
    "low_rank": LowRank,
}


def resolve(representation: str | Representation) -> Representation:
    """An options object from itself or from its name.

    Raises:
        DataError: an unknown name, or an options class that was not called.
    """
    if isinstance(representation, Representation):
        return representation
    if isinstance(representation, str) and representation in NAMES:
        return NAMES[representation]()
    raise DataError(
        f"unknown representation {representation!r}: expected one of {sorted(NAMES)}, or an "
        "options object such as nngeo_lazy.representations.KFAC(sharing='reduce')"
    )


def _always(statistics: Sequence[Statistic]) -> Make:
    return lambda _: statistics


def _check_sharing(sharing: str) -> None:
    if sharing not in ("expand", "reduce"):
        raise DataError(f"expected sharing='expand' or 'reduce', got {sharing!r}")
