"""What a matrix-free operator is made of besides its parameters, and what it remembers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..collectives import Group
from ..space import ParamSpace

__all__ = ["BatchFunction", "Memory", "Middle", "Source"]


class Middle(Protocol):
    """The middle S_n S_n^T of J^T S S^T J, on one batch."""

    @property
    def product(self) -> Callable[[Tensor], Tensor]:
        """A vector shaped like the values to S S^T v."""

    @property
    def sample(self) -> Callable[[int, torch.Generator | None], Tensor]:
        """(n, generator) to draws (n, *values) from N(0, S S^T); batches differ by themselves."""


class BatchFunction(Protocol):
    """One batch as a function of the parameters."""

    def values(self, parameters: Any) -> Tensor:
        """What is differentiated: outputs, losses of examples, or the sum of the losses."""

    def metric(self, values: Tensor) -> Middle:
        """The middle matrix at these values, which may be differentiable in them."""

    def wide(self) -> BatchFunction | None:
        """The same function in float64; None if it has none."""


class Source(Protocol):
    """A network with its data and a quantity: everything but the point."""

    @property
    def space(self) -> ParamSpace:
        """The parameters."""

    @property
    def total(self) -> float:
        """What sums over examples are divided by."""

    @property
    def num_rows(self) -> int:
        """Of the Jacobian: the number of all values."""

    @property
    def num_examples(self) -> int:
        """N: of all batches."""

    @property
    def group(self) -> Group:
        """The processes that share the batches; each goes through its own."""

    @property
    def held(self) -> bool:
        """Whether the batches lie in memory in any case, in one order."""

    @property
    def center(self) -> bool:
        """Whether the mean row is subtracted."""

    @property
    def random(self) -> bool:
        """Whether the metric is drawn, so that it has no derivative."""

    @property
    def mode(self) -> str:
        """The wanted way of differentiating: one of `MODES`, or "auto"."""

    @property
    def cache(self) -> str | bool:
        """Whether graphs are kept: True, False or "auto"."""

    @property
    def chunk_size(self) -> int | None:
        """How many columns go at once; None lets the products choose."""

    def scope(self) -> AbstractContextManager[None]:
        """In which batches are evaluated and differentiated."""

    def batches(self, start: int = 0) -> Iterator[BatchFunction]:
        """The batches, from the given one on."""

    def diagonal(self, parameters: Tensor) -> Tensor | None:
        """The diagonal (P,) at these parameters, from streamed rows; None if they cannot be."""

    def factored(self, parameters: Tensor) -> Callable[[int], Iterator[Any]] | None:
        """The rows of each batch from a number on, as forms; None if they cannot be streamed."""

    def moved(self, dtype: torch.dtype | None, device: Any) -> Source:
        """The same in another dtype or on another device."""


@dataclass
class Memory:
    """What an operator remembers between products: graphs, and what was found to work.

    Attributes:
        failed: modes that this network does not have.
        too_large: whether graphs do not all fit into the budget.
        complete: whether the graphs of all batches are kept.
        batched: whether vmap follows.
        proved: whether products were seen to be those of one matrix and its transpose.
        graph_bytes: of the largest batch: what a column takes at least, too.
    """

    failed: dict[str, str] = field(default_factory=dict)
    too_large: bool = False
    complete: bool = False
    batched: bool = True
    proved: bool = False
    graph_bytes: int = 0
    _key: tuple[Any, ...] | None = None
    _point: Tensor | None = None  # held, so that its address is not given to another tensor
    _kept: list[tuple[Any, Any]] = field(default_factory=list)

    def __reduce__(self) -> tuple[type[Memory], tuple[()]]:
        return Memory, ()  # a pickle holds no graphs

    def kept(self, point: Tensor) -> list[tuple[Any, Any]]:
        """The graphs of the first batches at this point; an empty list if there are none."""
        key = (point.data_ptr(), point._version, point.dtype)
        if key != self._key:
            self.forget()
            self._key, self._point = key, point.detach()
        return self._kept

    @property
    def partial(self) -> bool:
        """Whether the graphs of some batches are kept, and those of others do not fit."""
        return self.too_large and bool(self._kept)

    def forget(self) -> None:
        """Free all graphs."""
        self._key, self._point, self._kept, self.complete = None, None, [], False

    def elsewhere(self) -> Memory:
        """What stays known at another point."""
        return Memory(
            dict(self.failed),
            self.too_large,
            graph_bytes=self.graph_bytes,
            proved=self.proved,
        )
