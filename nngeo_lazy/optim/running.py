"""Running averages of a structured curvature, from the statistics of one step after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..averages import (
    averaged,
    decomposed,
    rebased,
    require_semidefinite,
    share_decompositions,
)
from ..errors import DataError, SpaceMismatchError
from ..facts import Facts
from ..files import load
from ..jacobian.forms import Rows, Stored
from ..operators import BaseLinearOperator
from ..representations import (
    EKFAC,
    NAMES,
    Diagonal,
    Factored,
    Mixed,
    QuasiDiagonal,
    Recipe,
    Streamed,
)
from ..space import ParamSpace
from ..statistics import Statistic, pool_statistics

__all__ = ["Forms", "Running"]


class Running:
    r"""An exponential average with bias correction: F_k = F_{k-1} + w_k (fresh - F_{k-1}).

    .. math:: w_k = (1 - \beta) / (1 - \beta^k)

    KFAC averages its factors. EKFAC averages its diagonal, which moves along when the eigenbasis of
    the averaged factors is taken anew. What is solved with is the average of the last `rebase`,
    decomposed; for representations that need no decomposition the latest.

    Args:
        representation: what is averaged.
        decay: beta.
        factors: whether Kronecker blocks are solved with as factors, and not decomposed.

    Attributes:
        operator: the average; None before the first step.
        solved: what is solved with.
    """

    def __init__(self, representation: Streamed, decay: float, factors: bool) -> None:
        _require_averaged(representation)
        self._whole = factors
        self.operator: BaseLinearOperator | None = None
        self.solved: BaseLinearOperator | None = None
        self._factors: BaseLinearOperator | None = None  # of an EKFAC, which its basis comes from
        self._decay = decay
        self._count = 0
        self._eigen = isinstance(representation, EKFAC)
        self._once = isinstance(representation, Factored)  # of each step alone
        self._free = isinstance(representation, (Diagonal, EKFAC, Factored, QuasiDiagonal))
        self._representation = representation
        if isinstance(representation, EKFAC):
            self._representation = representation.kfac
        self._recipes: list[tuple[Streamed, Recipe]] = []

    @property
    def count(self) -> int:
        """How many steps were taken into the average."""
        return self._count

    def begin(self, facts: Facts, rebase: bool) -> list[Statistic]:
        """The statistics of a step, to be updated with its forms."""
        self._recipes = []
        wanted: list[Streamed] = [self._representation]
        if self._eigen and not rebase and self.operator is not None:
            wanted.append(EKFAC(basis=self.operator))
        statistics: list[Statistic] = []
        for each in wanted:
            recipe = each.recipe(facts, range(len(facts.parts)))
            statistics += next(recipe)
            self._recipes.append((each, recipe))
        return statistics

    def keeps_forms(self, rebase: bool) -> bool:
        """Whether a step's forms are needed twice: in a basis that is made from them."""
        return self._eigen and (rebase or self.operator is None)

    def finish(
        self, facts: Facts, replay: Callable[[Sequence[Statistic]], None], rebase: bool
    ) -> float:
        """Take the statistics of a step into the average.

        Args:
            facts: with the numbers of examples.
            replay: updates statistics with the step's forms once more.
            rebase: whether a decomposition is made anew.

        Returns:
            The weight of the step in the average.

        Raises:
            NonFiniteError: they overflowed; the average is what it was.
        """
        count = self._count + 1
        weight = 1.0 if self._once else (1 - self._decay) / (1 - self._decay**count)
        group, factors, operator = facts.group, None, self.operator
        with group.together("the curvature of a step"):
            fresh = [_finished(each, recipe, facts) for each, recipe in self._recipes]
            if self._eigen:
                factors = averaged(self._factors, fresh[0], weight)
        if factors is not None and len(fresh) == 1:  # in a new basis
            share_decompositions(factors, group)
            with group.together("a new basis"):
                basis = EKFAC(basis=factors)
                recipe = basis.recipe(facts, range(len(facts.parts)))
                statistics = next(recipe)
                replay(statistics)
            pool_statistics(statistics, group, facts.space.device)
            with group.together("the curvature in a new basis"):
                fresh.append(_finished(basis, recipe, facts))
                operator = None if operator is None else rebased(operator, factors)
        with group.together("an average"):
            operator = averaged(None if self._once else operator, fresh[-1], weight)
        if rebase or self._free or self.solved is None:
            if not self._whole:
                share_decompositions(operator, group)
            self.solved = operator if self._whole else decomposed(operator)
        self._count = count
        self.operator, self._factors = operator, factors
        return weight

    def state(self) -> dict[str, Any]:
        """Tensors and plain data."""
        kept: dict[str, Any] = {"count": self._count}
        if not self._once:
            for name in ("operator", "_factors", "solved"):
                held = getattr(self, name)
                kept[name] = None if held is None else held.state_dict()
        return kept

    def restore(self, state: Mapping[str, Any], space: ParamSpace) -> None:
        """Take over a state, of parameters of a space."""
        held = {}
        for name in ("operator", "_factors", "solved"):
            given = state.get(name)
            loaded = None if given is None else load(given, map_location=space.device)
            if loaded is not None and not set(loaded.space.names) <= set(space.names):  # type: ignore[union-attr]
                raise SpaceMismatchError(
                    f"expected the curvature of {list(space.names)}, got one of "
                    f"{list(loaded.space.names)}"  # type: ignore[union-attr]
                )
            held[name] = loaded
            if loaded is not None:
                require_semidefinite(loaded)
        self._count = int(state["count"])
        self.operator, self._factors = held["operator"], held["_factors"]
        self.solved = held["solved"]


@dataclass
class Forms:
    """Statistics of a step, and its forms if they are needed twice."""

    statistics: list[Statistic]
    keep: bool
    kept: list[Any] = field(default_factory=list)

    def update(self, forms: Sequence[Any], first: bool, last: bool) -> None:
        """Add a chunk of directions."""
        _update(self.statistics, forms, first, last)
        if self.keep:
            self.kept.append(([_whole(form) for form in forms], first, last))

    def replay(self, statistics: Sequence[Statistic]) -> None:
        """Add all chunks to other statistics."""
        for forms, first, last in self.kept:
            _update(statistics, forms, first, last)


def _whole(form: Any) -> Any:
    """A form that needs the loop's graph no more."""
    return Stored(form.rows()) if isinstance(form, Rows) else form


def _update(statistics: Sequence[Statistic], forms: Sequence[Any], first: bool, last: bool) -> None:
    for each in statistics:
        each.update([forms[k] for k in each.indices], first, last)


def _finished(representation: Streamed, recipe: Recipe, facts: Facts) -> BaseLinearOperator:
    try:
        recipe.send(facts)
    except StopIteration as done:
        return representation.finish(facts, done.value)
    raise RuntimeError(f"{representation} wants a second pass over a training step")


def _require_averaged(representation: Streamed) -> None:
    kinds: list[Streamed] = [representation]
    others: tuple[type[Streamed], ...] = ()
    if isinstance(representation, Mixed):
        kinds, others = representation.members, (EKFAC, Factored)
    wrong = [each for each in kinds if not each.averages or isinstance(each, others)]
    given = isinstance(representation, EKFAC) and representation.basis is not None
    if wrong or given:
        names = ", ".join(
            kind.__name__
            for kind in NAMES.values()
            if issubclass(kind, Streamed) and kind.averages and not issubclass(kind, others)
        )
        raise DataError(
            f"expected a representation of which running averages keep the form ({names}), got "
            f"{(wrong or [representation])[0]!r}"
        )
