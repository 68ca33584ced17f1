"""A network and its data, as what matrix-free operators differentiate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..data import Batch
from ..errors import DataError
from ..network import Network
from ..quantities import Metric
from ..space import ParamSpace
from ..sweep import Sweep
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

    def scope(self) -> AbstractContextManager[None]:
        """Inside, the functions of the batches may be evaluated and differentiated."""
        return self.network.scope()

    def batches(self, start: int = 0) -> Iterator[NetworkBatch]:
        """The batches, from the given one on; as many as in the build."""
        count, generator = 0, self.sweep.problem.generator()
        for batch in self.sweep.problem.batches:
            count += 1
            if count > start:
                yield NetworkBatch(self, batch, generator)
        if count != self.num_batches:
            raise DataError(
                f"expected the {self.num_batches} batches of the build on every pass, but the "
                f"loader gave {count}: pass one of a fixed length, or list(...) of its batches"
            )

    def diagonal(self, parameters: Tensor) -> Tensor | None:
        """The diagonal (P,) at these parameters, from streamed rows; None after a move."""
        if not self.streams:
            return None
        with torch.inference_mode(False):
            made: Tensor = Diagonal().build(self.sweep.at(self.network.at(parameters))).diagonal()
            return made.to(parameters.dtype)

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
    generator: torch.Generator | None

    def values(self, parameters: Sequence[Tensor]) -> Tensor:
        """What is differentiated: outputs, losses of examples, or the sum of the losses."""
        outputs = self.source.network(parameters, self.batch.raw)
        return self.source.sweep.problem.quantity.values(outputs, self._target(outputs))

    def metric(self, values: Tensor) -> Metric:
        """The middle S S^T at these values."""
        return self.source.sweep.problem.quantity.metric(
            values, self._target(values), self.generator
        )

    def wide(self) -> NetworkBatch | None:
        """The same functions in float64; None on devices that have no float64."""
        if self.source.space.device.type == "mps":
            return None
        return replace(self, source=self.source.moved(torch.float64, None))

    def _target(self, like: Tensor) -> Tensor | None:
        """The labels, where the operator was moved to."""
        target = self.batch.target
        if target is None or self.source.streams:
            return target
        return target.to(like) if target.is_floating_point() else target.to(like.device)
