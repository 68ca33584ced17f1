"""Representations by name, and mixtures of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from ..arguments import check_fields
from ..errors import DataError, SpaceMismatchError
from ..facts import Facts
from ..quantities import MatrixKind
from ..selectors import select
from ..space import ParamSpace
from ..statistics import Statistic
from .dense import Dense
from .form_stack import Factored
from .implicit import Implicit
from .recipes import Recipe, together
from .representation import Representation, Streamed
from .single import EKFAC, KFAC, BlockDiagonal, Diagonal, LowRank, QuasiDiagonal

__all__ = ["Mixed", "RepresentationLike", "resolve"]


@dataclass(frozen=True)
class Mixed(Streamed):
    """One representation for each of several groups of parameters, in one build.

    Args:
        default: for the parameters that no selector names; None if there must be none.
        chosen: {selector: representation}; "dense" and "low_rank" make one block of a group.

    Raises:
        SpaceMismatchError: a selector that matches nothing, selectors that overlap, a layer whose
            block they would cut, or parameters that are left out.

    Example:
        >>> import torch
        >>> import nngeo_lazy as ng
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        >>> mixed = Mixed("kfac", {"1": "dense"})
        >>> F = ng.FIM(model, torch.randn(9, 3), mixed, likelihood="gaussian")
        >>> [block._kind() for block in F.members]
        ['Kronecker (4x4) x (4x4)', 'dense 10x10']
    """

    default: str | Representation | None = "kfac"
    chosen: Mapping[Any, str | Representation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def members(self) -> list[Streamed]:
        """The representations that it is made of."""
        given = [] if self.default is None else [self.default]
        return [stored(each) for each in (*given, *self.chosen.values())]

    @property
    def passes(self) -> int:
        """As many as the most demanding member needs."""
        return max(each.passes for each in self.members)

    def require_fit(self, facts: Facts) -> None:
        """Refuse selectors that do not fit, and what a member refuses."""
        self._groups(facts.space)
        for each in self.members:
            each.require_fit(facts)

    @property
    def truncates(self) -> bool:
        """Whether a member does."""
        return any(each.truncates for each in self.members)

    def recipe(self, facts: Facts, indices: Sequence[int]) -> Recipe:
        """The recipes of all members, side by side."""
        recipes = [each.recipe(facts, inside) for each, inside in self._parts(facts, indices)]
        return (yield from together(recipes))

    def described(self) -> str:
        """The members, without their selectors."""
        return f"Mixed({', '.join(each.described() for each in self.members)})"

    def outline(self, facts: Facts, indices: Sequence[int]) -> list[Sequence[Statistic]]:
        """The statistics of all members."""
        passes: list[list[Statistic]] = [[] for _ in range(self.passes)]
        for representation, inside in self._parts(facts, indices):
            for own, more in zip(passes, representation.outline(facts, inside), strict=False):
                own += more
        return list(passes)

    def _parts(self, facts: Facts, indices: Sequence[int]) -> Iterator[tuple[Streamed, list[int]]]:
        """Each representation with its parts, if it has any."""
        for representation, names in self._groups(facts.space):
            inside = []
            for k in indices:
                part = set(facts.parts[k].names)
                if names >= part:
                    inside.append(k)
                elif names & part:
                    raise SpaceMismatchError(
                        f"{sorted(part)} have one block, but the selectors of Mixed name only "
                        f"{sorted(names & part)} together: select the whole layer"
                    )
            if inside:
                yield representation, inside

    def _groups(self, space: ParamSpace) -> list[tuple[Streamed, set[str]]]:
        """Each representation with its parameters."""
        groups: list[tuple[Streamed, set[str]]] = []
        left = set(space.names)
        for selector, representation in self.chosen.items():
            names = set(select(space, selector))
            if twice := sorted(names - left):
                raise SpaceMismatchError(
                    f"the selector {selector!r} of Mixed names {twice}, which another one has "
                    "already: make them disjoint"
                )
            left -= names
            groups.append((stored(representation), names))
        if left and self.default is None:
            missing = [name for name in space.names if name in left]
            raise SpaceMismatchError(
                f"Mixed leaves {missing} without a representation: name them in a selector, or "
                "pass a default"
            )
        if left and self.default is not None:
            groups.append((stored(self.default), left))
        return groups


Name: TypeAlias = Literal[
    "dense",
    "block_diagonal",
    "diagonal",
    "quasi_diagonal",
    "kfac",
    "ekfac",
    "low_rank",
    "implicit",
    "factored",
]
RepresentationLike: TypeAlias = Name | Representation

NAMES: dict[str, type[Representation]] = {
    "implicit": Implicit,
    "factored": Factored,
    "dense": Dense,
    "block_diagonal": BlockDiagonal,
    "diagonal": Diagonal,
    "quasi_diagonal": QuasiDiagonal,
    "kfac": KFAC,
    "ekfac": EKFAC,
    "low_rank": LowRank,
}


def stored(representation: Any) -> Streamed:
    """A representation that can be one of several: `resolve`, without the matrix-free one."""
    known = resolve(representation)
    if known.shares_blocks:
        raise DataError(
            "Sharded shares out all blocks of a matrix, and is no part of another representation: "
            "put it around the whole, Sharded(Mixed(...))"
        )
    if isinstance(known, Streamed):
        return known
    raise DataError(
        "'implicit' is a whole matrix, and no part of Mixed: build it on its own, for some "
        "parameters with params="
    )


def resolve(representation: Any, kind: MatrixKind = MatrixKind.GAUSS_NEWTON) -> Representation:
    """An options object from itself or from its name.

    Args:
        representation: an object, or one of `NAMES`.
        kind: which matrix it shall represent.

    Returns:
        The object.

    Raises:
        DataError: an unknown name, an options class that was not called, or a representation that
            has no such matrix.

    Example:
        >>> resolve("low_rank")
        LowRank(rank=None)
    """
    known = representation
    if isinstance(representation, str) and representation in NAMES:
        known = NAMES[representation]()
    if not isinstance(known, Representation):
        raise DataError(
            f"unknown representation {representation!r}: expected one of {sorted(NAMES)}, or an "
            "options object such as nngeo_lazy.representations.KFAC(sharing='reduce'); "
            "docs/choose.md explains them"
        )
    if kind not in known.matrices:
        names = ", ".join(repr(name) for name, each in NAMES.items() if kind in each.matrices)
        raise DataError(
            f"expected the representation of a {kind.value} to be one of {names}, got "
            f"{representation!r}"
        )
    return known
