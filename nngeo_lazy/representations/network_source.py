"""A network and its data, as what matrix-free operators differentiate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import tree
from ..collectives import Group, seed_of
from ..data import Batch
from ..errors import DataError
from ..network import Network
from ..operators.factored import FactoredJacobianLinearOperator
from ..precision import widest
from ..quantities import Metric
from ..space import ParamSpace
from ..sweep import Sweep
from ..switches import outside_inference, untraced
from .form_stack import streamed_rows
from .single import Diagonal

__all__ = ["NetworkBatch", "NetworkSource"]


@dataclass(frozen=True)
class NetworkSource:
    """A network and its data as functions of the parameters (see `derivatives.source.Source`)."""

    space: ParamSpace
    network: Network
    sweep: Sweep
    total: float
    num_rows: int
    num_examples: int
    num_batches: int
    held: bool
    center: bool
    random: bool
    mode: str
    cache: str | bool
    chunk_size: int | None
    streams: bool = True

    @property
    def group(self) -> Group:
        """The processes that share the batches."""
        return self.sweep.problem.group

    def scope(self) -> AbstractContextManager[None]:
        """Inside, the functions of the batches may be evaluated and differentiated."""
        return self.network.scope()

    def batches(self, start: int = 0) -> Iterator[NetworkBatch]:
        """The batches, from the given one on; as many as in the build."""
        count = 0
        for batch in self.sweep.problem.batches:
            count += 1
            if count > start:
                yield NetworkBatch(self, batch)
        if count != self.num_batches:
            raise DataError(
                f"expected the {self.num_batches} batches of the build on every pass, but the "
                f"loader gave {count}: pass one of a fixed length, or list(...) of its batches"
            )

    @untraced
    def diagonal(self, parameters: Tensor) -> Tensor | None:
        """The diagonal (P,) at these parameters, from streamed rows; None after a move."""
        if not self.streams:
            return None
        with outside_inference():
            made: Tensor = Diagonal().build(self.sweep.at(self.network.at(parameters))).diagonal()
            return made.to(parameters.dtype)

    def factored(
        self, parameters: Tensor
    ) -> Callable[[int], Iterator[FactoredJacobianLinearOperator]] | None:
        """The rows of each batch from a number on; None after a move, or if they are too many."""
        problem = self.sweep.problem
        many = self.num_rows > problem.max_directions * self.num_examples
        if not self.streams or self.center or self.group.size > 1 or many:
            return None
        with outside_inference():
            sweep = self.sweep.at(self.network.at(parameters))
        return partial(streamed_rows, sweep)

    def moved(self, dtype: torch.dtype | None, device: Any) -> NetworkSource:
        """The same in another dtype or on another device."""
        dtype, device = dtype or self.space.dtype, torch.device(device or self.space.device)
        if dtype == self.space.dtype and device == self.space.device:
            return self
        return replace(
            self,
            space=self.space.to(dtype=dtype, device=device),
            network=self.network.moved(dtype, device),
            streams=False,
        )


@dataclass(frozen=True)
class NetworkBatch:
    """One batch as functions of the parameters."""

    source: NetworkSource
    batch: Batch

    def values(self, parameters: Sequence[Tensor]) -> Tensor:
        """What is differentiated: outputs, losses of examples, or the sum of the losses."""
        outputs = self.source.network(parameters, self.batch.raw)
        return self.source.sweep.problem.quantity.values(outputs, self._target(outputs))

    def metric(self, values: Tensor) -> Metric:
        """The middle S S^T at these values, whose draws depend on the batch and not on others."""
        problem = self.source.sweep.problem
        made = problem.quantity.metric(values, self._target(values), problem.draws(self.batch))

        def sample(n: int, generator: torch.Generator | None) -> Tensor:
            return made.sample(n, keyed(generator, self.batch.key))

        return Metric(made.product, sample)

    def wide(self) -> NetworkBatch | None:
        """The same functions in float64; None on devices that have no float64."""
        if widest(self.source.space.device) != torch.float64:
            return None
        return replace(self, source=self.source.moved(torch.float64, None))

    def _target(self, like: Tensor) -> Any:
        """The labels, where the operator was moved to."""
        if self.source.streams:
            return self.batch.target
        return tree.map_leaves(partial(_moved, like), self.batch.target)


def _moved(like: Tensor, leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.to(like) if leaf.is_floating_point() else leaf.to(like.device)


def keyed(generator: torch.Generator | None, key: tuple[int, ...]) -> torch.Generator | None:
    """A generator for one batch, from the seed of one for all of them."""
    if generator is None:
        return None
    seed = seed_of(generator.initial_seed(), *key)
    return torch.Generator(device=generator.device).manual_seed(seed)
