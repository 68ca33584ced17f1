"""What every representation is: a recipe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from ..jacobian.parts import Part
from ..operators import BaseLinearOperator
from ..statistics import Make, Statistic, Sweep
from .recipes import Block, Recipe, block_diagonal

__all__ = ["Representation"]


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
                operator = self.finish(sweep, done.value)
                break
            sweep(_always(wanted))
        quantity = {**operator.info.quantity, "representation": self.described()}
        known: BaseLinearOperator = operator._with_info(replace(operator.info, quantity=quantity))
        return known

    def described(self) -> str:
        """In words: statistics of two representations with the same ones can be pooled."""
        return repr(self)


def _always(statistics: Sequence[Statistic]) -> Make:
    return lambda _: statistics
