"""What every representation is, and what one is that is made from statistics of passes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar, TypeAlias

from ..facts import Cost, Facts, Sample
from ..operators import BaseLinearOperator
from ..operators.info import Info
from ..quantities import MatrixKind
from ..statistics import Statistic
from ..sweep import Make, Sweep
from .recipes import Block, Recipe, block_diagonal, together

__all__ = ["Blockwise", "Representation", "Run", "Streamed"]

Run: TypeAlias = Callable[[Make, bool], tuple[Facts, Sequence[Statistic]]]


class Representation(ABC):
    """What to build; one of the options objects below, or its name in lower case.

    Attributes:
        matrices: which matrices it can represent.

    Example:
        >>> import nngeo_lazy as ng
        >>> kfac = ng.representations.KFAC()
        >>> isinstance(kfac, Representation), kfac.described()
        (True, "KFAC(sharing='expand')")
    """

    matrices: ClassVar[frozenset[MatrixKind]] = frozenset({MatrixKind.GAUSS_NEWTON})

    @abstractmethod
    def build(self, sweep: Sweep) -> BaseLinearOperator:
        """The matrix of the sweep's quantity, which is one of `matrices`."""

    @abstractmethod
    def costs(self, facts: Facts, sample: Sample) -> list[list[Cost]]:
        """What `build` will cost: for each pass over the data, the costs of its parts."""

    def require_fit(self, facts: Facts) -> None:  # noqa: B027 - most have nothing to check
        """Raise DataError or SpaceMismatchError if this cannot be built; before any pass."""

    def described(self) -> str:
        """In words: statistics of two representations with the same ones can be pooled."""
        return repr(self)

    @property
    def truncates(self) -> bool:
        """Whether it keeps the best approximation of a rank, which is not linear in the data."""
        return False

    @property
    def shares_blocks(self) -> bool:
        """Whether each process of a group keeps some blocks alone."""
        return False

    def sign(self, info: Info) -> Info:
        """The same, of a matrix in this representation."""
        quantity = {**info.quantity, "representation": self.described()}
        return replace(info, quantity=quantity, truncated=self.truncates)


class Streamed(Representation):
    """A representation whose blocks are made from statistics of the data, as a recipe says.

    A new one is a frozen dataclass with a `recipe`, and an operator for its blocks. It is then
    passed as an object wherever a representation is taken.

    Attributes:
        averages: whether an average of several of its matrices keeps its form; optimizers ask.

    Example:
        >>> import nngeo_lazy as ng
        >>> isinstance(ng.representations.EKFAC(), Streamed), ng.representations.EKFAC().passes
        (True, 2)
    """

    averages: ClassVar[bool] = True

    @property
    def passes(self) -> int:
        """How often the data are read."""
        return 1

    @abstractmethod
    def recipe(self, facts: Facts, indices: Sequence[int]) -> Recipe:
        """Yield the statistics of each pass over the data, then return the blocks.

        Args:
            facts: what the first batch shows. Each `yield` returns what is known after its pass.
            indices: the parts to represent.
        """

    def finish(self, facts: Facts, blocks: Sequence[Block]) -> BaseLinearOperator:
        """The operator of all blocks."""
        return block_diagonal(facts, blocks)

    def outline(self, facts: Facts, indices: Sequence[int]) -> list[Sequence[Statistic]]:
        """The statistics of each pass, without a pass: their costs are counted."""
        return [next(self.recipe(facts, indices))]

    def costs(self, facts: Facts, sample: Sample) -> list[list[Cost]]:
        """What the statistics of each pass cost."""
        passes = self.outline(facts, range(len(facts.parts)))
        return [[cost for each in wanted for cost in each.costs(sample)] for wanted in passes]

    def build(self, sweep: Sweep) -> BaseLinearOperator:
        """The operator, from one or more passes over the data."""
        return self.build_by(sweep, sweep.run)

    def build_by(self, sweep: Sweep, run: Run) -> BaseLinearOperator:
        """The same; `run` makes the passes, as `Sweep.run` does."""
        self.require_fit(sweep.facts)
        recipes: list[Recipe] = []

        def start(facts: Facts) -> Sequence[Statistic]:
            recipes[:] = [self.recipe(facts, range(len(facts.parts)))]
            return next(recipes[0])

        facts, _ = run(start, self.passes > 1)
        while True:
            try:
                wanted = recipes[0].send(facts)
            except StopIteration as done:
                operator = self.finish(facts, done.value)
                break
            facts, _ = run(_always(wanted), False)
        known: BaseLinearOperator = operator._with_info(self.sign(operator.info))
        return known


class Blockwise(Streamed):
    """A representation with a block of its own for each part.

    A new one says how a `block` is made.

    Example:
        >>> import nngeo_lazy as ng
        >>> isinstance(ng.representations.KFAC(), Blockwise)
        True
    """

    @abstractmethod
    def block(self, facts: Facts, k: int) -> Recipe:
        """Yield the statistics of a part, then return its block in a list.

        Args:
            facts: what the first batch shows. Each `yield` returns what is known after its pass.
            k: the part, as a position in `facts.parts`.
        """

    def recipe(self, facts: Facts, indices: Sequence[int]) -> Recipe:
        """The blocks of all parts, side by side."""
        return (yield from together([self.block(facts, k) for k in indices]))


def _always(statistics: Sequence[Statistic]) -> Make:
    return lambda _: statistics
