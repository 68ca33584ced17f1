"""A forward pass of a loop: what its backward pass brought to each of its heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ..jacobian.capture import Recorded
from .replay import Replay

__all__ = ["Mark", "Passed", "Run", "examples_of"]

_MARK = "nngeo_lazy.optim"  # where a graph keeps the mark of its pass


@dataclass
class Mark:
    """What all watchers of one forward pass share: whether one of them differentiates it now."""

    scoring: bool = False

    @classmethod
    def of(cls, heads: Sequence[Tensor]) -> Mark:
        """The mark of the pass that made these outputs; it lives and dies with their graph."""
        held: list[Any] = [get_gradient_edge(outputs).node.metadata for outputs in heads]
        mark: Mark = next((each[_MARK] for each in held if _MARK in each), cls())
        for each in held:
            each[_MARK] = mark
        return mark

    @contextmanager
    def scored(self) -> Iterator[None]:
        """Inside, backward passes from the outputs are nobody's loss."""
        before, self.scoring = self.scoring, True
        try:
            yield
        finally:
            self.scoring = before


@dataclass
class Run:
    """A forward pass, which its heads share.

    Attributes:
        mark: shared with the other watchers of the pass.
        replay: how to run it again, if that may be needed.
        recorded: its layers, while the loop's own gradients at them are collected.
        at_layers: those gradients, by the index of the recorded edge.
        counts: whether the backward pass that runs is the loop's.
    """

    mark: Mark
    replay: Replay | None = None
    recorded: Recorded | None = None
    at_layers: dict[int, Tensor] = field(default_factory=dict)
    counts: bool = False


@dataclass
class Passed:
    """The outputs of one head in a forward pass, and what the loop's loss is there.

    Attributes:
        outputs: (N, ...), detached.
        run: the forward pass.
        head: which of the model's heads it is.
        gradient: of the loop's loss at the outputs.
    """

    outputs: Tensor
    run: Run
    head: int = 0
    gradient: Tensor | None = None


def examples_of(passes: Sequence[Passed]) -> int:
    """How many examples there are; those of several heads are the same."""
    return sum({id(passed.run): passed.outputs.shape[0] for passed in passes}.values())
