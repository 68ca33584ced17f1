"""A representation that keeps the matrix of another one in another place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

from ..facts import Facts
from ..statistics import Statistic
from .mixed import resolve
from .recipes import Recipe
from .representation import Representation, Streamed

__all__ = ["Around"]


@dataclass(frozen=True)
class Around(Streamed):
    """What is built is what the representation inside builds, by the same passes and recipes.

    Args:
        representation: the one inside.
    """

    averages: ClassVar[bool] = False

    representation: str | Representation = field(default="kfac")

    @property
    def _inner(self) -> Streamed:
        return cast(Streamed, resolve(self.representation))

    @property
    def passes(self) -> int:
        """As many as the representation needs."""
        return self._inner.passes

    @property
    def truncates(self) -> bool:
        """As the representation."""
        return self._inner.truncates

    def described(self) -> str:
        """The representation: the statistics are the same."""
        return self._inner.described()

    def require_fit(self, facts: Facts) -> None:
        """Refuse what the representation refuses."""
        self._inner.require_fit(facts)

    def recipe(self, facts: Facts, indices: Sequence[int]) -> Recipe:
        """That of the representation."""
        return self._inner.recipe(facts, indices)

    def outline(self, facts: Facts, indices: Sequence[int]) -> list[Sequence[Statistic]]:
        """That of the representation."""
        return self._inner.outline(facts, indices)
