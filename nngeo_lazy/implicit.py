"""From a quantity and its data to matrix-free operators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .data import Batch, refuse_shuffling
from .derivatives.source import ImplicitInfo
from .errors import DataError, StochasticModelError
from .jacobian.proof import agree
from .network import Network
from .operators.matrix_free import (
    GaussNewtonLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
)
from .quantities import Metric
from .representations import Diagonal, Implicit
from .space import ParamSpace
from .sweep import DataSweep, Totals

__all__ = ["gauss_newton", "hessian", "jacobian"]


def gauss_newton(sweep: DataSweep, options: Implicit) -> GaussNewtonLinearOperator:
    """The Fisher or Gauss-Newton matrix of a sweep's quantity."""
    if sweep.quantity.estimator == "mc":
        refuse_shuffling(sweep.batches.loader, "a matrix-free 'mc' matrix, whose draws are redone,")
    return GaussNewtonLinearOperator(*_point(sweep), info=_info(sweep, options))


def hessian(sweep: DataSweep, options: Implicit) -> HessianLinearOperator:
    """The Hessian of a sweep's loss."""
    return HessianLinearOperator(*_point(sweep), info=_info(sweep, options))


def jacobian(sweep: DataSweep, options: Implicit) -> JacobianLinearOperator:
    """The Jacobian of a sweep's values."""
    return JacobianLinearOperator(*_point(sweep), info=_info(sweep, options))


def _point(sweep: DataSweep) -> tuple[Tensor]:
    return (sweep.space.values(sweep.model).detach().clone(),)


@dataclass(frozen=True)
class _Source:
    """See `derivatives.source.Source`."""

    space: ParamSpace
    network: Network
    sweep: DataSweep
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
        return self.network.scope()

    def batches(self, start: int = 0) -> Iterator[_Batch]:
        count = 0
        with self.sweep.seeded() as generator:
            for batch in self.sweep.batches:
                count += 1
                if count > start:
                    yield _Batch(self, batch, generator)
        if count != self.num_batches:
            raise DataError(
                f"expected the {self.num_batches} batches of the build on every pass, but the "
                f"loader gave {count}: pass one of a fixed length, or list(...) of its batches"
            )

    def diagonal(self, parameters: Tensor) -> Tensor | None:
        if not self.streams:
            return None
        with torch.inference_mode(False), self.network.loaded(parameters):
            made: Tensor = Diagonal().build(self.sweep).diagonal()
            return made.to(parameters.dtype)

    def moved(self, dtype: torch.dtype | None, device: Any) -> _Source:
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
class _Batch:
    source: _Source
    batch: Batch
    generator: torch.Generator | None

    def values(self, parameters: Sequence[Tensor]) -> Tensor:
        outputs = self.source.network(parameters, self.batch.raw)
        return self.source.sweep.quantity.values(outputs, self._target(outputs))

    def metric(self, values: Tensor) -> Metric:
        return self.source.sweep.quantity.metric(values, self._target(values), self.generator)

    def wide(self) -> _Batch | None:
        if self.source.space.device.type == "mps":
            return None
        return replace(self, source=self.source.moved(torch.float64, None))

    def _target(self, like: Tensor) -> Tensor | None:
        """The labels, where the operator was moved to."""
        target = self.batch.target
        if target is None or self.source.streams:
            return target
        return target.to(like) if target.is_floating_point() else target.to(like.device)


def _info(sweep: DataSweep, options: Implicit) -> ImplicitInfo:
    """Everything but the point, from one forward pass over the data."""
    space, quantity = sweep.space, sweep.quantity
    network = Network(sweep.model, space, sweep.batches.forward)
    leaves = [p.detach().requires_grad_() for p in space.parameters(sweep.model).values()]
    totals, num_rows, num_batches = Totals(quantity, space.device), 0, 0
    with torch.inference_mode(False), network.scope(), torch.no_grad(), sweep.seeded():
        for batch in sweep.batches:
            with torch.enable_grad():  # a forward pass may call autograd itself
                graph = network(leaves, batch.raw)
            outputs = graph.detach()
            quantity.fit(outputs, batch.target)
            totals.add(outputs, batch.target)
            if num_batches == 0:
                _require_differentiable(graph)
                quantity.values(outputs, batch.target)  # whether it has the labels that it needs
                if options.check and bool(outputs.isfinite().all()):
                    with torch.enable_grad():
                        _require_fixed(outputs, network(leaves, batch.raw))
            del graph
            one_each = quantity.estimator == "empirical"
            num_rows += outputs.shape[0] if one_each else outputs.numel()
            num_batches += 1
    num_examples, num_terms, total = totals.finish()
    if sweep.center and num_rows % num_examples:
        raise DataError("center=True expects every batch to have outputs of one shape")
    random = quantity.estimator == "mc"
    source = _Source(
        space=space,
        network=network,
        sweep=sweep,
        total=total,
        num_rows=num_rows,
        num_examples=num_examples,
        num_batches=num_batches,
        held=sweep.batches.held and not random,
        center=sweep.center,
        random=random,
        mode=options.mode,
        cache=options.cache,
        chunk_size=options.chunk_size,
    )
    described = {**sweep.described, "representation": repr(options)}
    return ImplicitInfo(
        space, num_examples, num_terms, {}, described, totals.log_likelihood, source=source
    )


def _require_differentiable(outputs: Tensor) -> None:
    if not outputs.requires_grad:
        raise DataError(
            "the outputs do not depend on any selected parameter: select others with params=, "
            "and check that the forward pass does not run under no_grad or detach"
        )


def _require_fixed(first: Tensor, second: Tensor) -> None:
    if not agree(second, first):
        raise StochasticModelError(
            "expected one fixed function, but two forward passes of the same batch differ: call "
            "model.eval(), and remove sampling from the forward pass (Implicit(check=False) skips "
            "this check)"
        )
