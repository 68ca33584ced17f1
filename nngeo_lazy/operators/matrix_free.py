"""The matrix-free operators: a Gauss-Newton or Fisher matrix, a Hessian, a Jacobian."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..derivatives.opaque import Map, apply_map
from ..derivatives.products import GaussNewtonMap, HessianMap, JacobianMap, TransposedMap
from ..derivatives.source import Memory, Source
from ..derivatives.summed import SummedMap
from ..errors import UnsupportedLayerError
from .base import BaseLinearOperator, Krylov, flat_positions
from .info import Info
from .lazy import LazyLinearOperator
from .vectors import flattened
from .views import RestrictedLinearOperator

__all__ = [
    "GaussNewtonLinearOperator",
    "HessianLinearOperator",
    "ImplicitLinearOperator",
    "JacobianLinearOperator",
    "TransposedLinearOperator",
]


class ImplicitLinearOperator(LazyLinearOperator):
    """A matrix of derivatives that is never stored: each product passes over the data.

    Differentiable in the parameters, any number of times, and so are its solves.

    Args:
        parameters: the point (P,), all parameters as one flat vector.
        source: the network and its data.
        memory: of products at this point; new by default.
        info: what is known besides the numbers.
    """

    def __init__(
        self,
        parameters: Tensor,
        *,
        source: Source,
        memory: Memory | None = None,
        info: Info | None = None,
    ) -> None:
        memory = Memory() if memory is None else memory
        super().__init__(parameters, source=source, memory=memory, info=info)
        self.parameters, self.source, self.memory = parameters, source, memory

    @abstractmethod
    def _map(self) -> Map:
        """The product as a function of (columns, parameters)."""

    def _size(self) -> torch.Size:
        n = self.parameters.shape[-1]
        return torch.Size((n, n))

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        return self

    def _apply(self, v: Tensor) -> Tensor:
        group, own = self.source.group, self._map()
        return _apply(own if group.size == 1 else SummedMap(own, group), v, self.parameters)

    def _at(self, parameters: Tensor) -> BaseLinearOperator:
        info = replace(self.info, quantity={}, log_likelihood=None)
        memory = self.memory.elsewhere()
        return self.__class__(parameters, source=self.source, memory=memory, info=info)

    def _moved_fields(self, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        fields = super()._moved_fields(dtype, device)
        return {**fields, "source": self.source.moved(dtype, device), "memory": Memory()}

    def _kind(self) -> str:
        return "matrix-free"


class GaussNewtonLinearOperator(ImplicitLinearOperator):
    """J^T S S^T J, summed over examples and divided by the total: a Fisher or Gauss-Newton matrix.

    Args:
        parameters: the point (P,).
        source: the network and its data.
        memory: of products at this point; new by default.
        info: what is known besides the numbers.
    """

    def _map(self) -> GaussNewtonMap:
        return GaussNewtonMap(self.source, self.memory)

    def _diagonal(self) -> Tensor:
        if self.parameters.requires_grad and torch.is_grad_enabled():
            return super()._diagonal()  # by products, which have a gradient
        streamed = self.source.diagonal(self.parameters.detach())
        return super()._diagonal() if streamed is None else streamed

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        with torch.no_grad():
            return self._map().draw(n, self.parameters.detach(), generator).mT


class HessianLinearOperator(ImplicitLinearOperator):
    """The Hessian of a loss, indefinite in general: solve it with `ng.solve(method="minres")`.

    Args:
        parameters: the point (P,).
        source: the network and its data.
        memory: of products at this point; new by default.
        info: what is known besides the numbers.
    """

    def _map(self) -> Map:
        return HessianMap(self.source, self.memory)


class RectangularLinearOperator(LazyLinearOperator):
    """What is not square has no solve of its own."""

    maps_to_parameters = False
    _implicit_in_tensors = False
    _implicit_in_vector = False

    @property
    def known_symmetric(self) -> bool:
        """Not even if it has as many rows as columns."""
        return False

    def _solve_columns(self, v: Tensor, krylov: Krylov) -> Tensor:
        raise UnsupportedLayerError(
            "solve needs a square matrix, and a Jacobian is none: take ng.solve(J, b), the least-"
            "squares solution, or solve with a GGN or an empirical Fisher"
        )

    def _norm(self, ord: Any) -> Tensor:
        if ord == "fro" and self.shape[-2] < self.shape[-1]:
            norm: Tensor = self._transpose_nonbatch()._norm(ord)
            return norm
        return super()._norm(ord)

    def _dense(self) -> Tensor:
        if self.shape[-2] < self.shape[-1]:  # fewer products from the other side
            transposed: Any = self._transpose_nonbatch()
            dense: Tensor = LazyLinearOperator._dense(transposed)
            return dense.mT
        return super()._dense()


class JacobianLinearOperator(RectangularLinearOperator, ImplicitLinearOperator):
    """The Jacobian of outputs, or of the losses of examples, in the parameters.

    Args:
        parameters: the point (P,).
        source: the network and its data.
        memory: of products at this point; new by default.
        info: what is known besides the numbers.
    """

    def _size(self) -> torch.Size:
        return torch.Size((self.source.num_rows, self.parameters.shape[-1]))

    def _map(self) -> Map:
        return JacobianMap(self.source, self.memory)

    def each_batch(self) -> Any:
        """The rows of each batch from a number on, differentiated anew; None if they cannot be."""
        if self.parameters.requires_grad and torch.is_grad_enabled():
            return None  # products have a gradient
        return self.source.factored(self.parameters.detach())

    def _apply_transposed(self, u: Tensor) -> Tensor:
        return _apply(TransposedMap(self.source, self.memory), u, self.parameters)

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        return TransposedLinearOperator(self)

    def _restrict(self, names: tuple[str, ...]) -> BaseLinearOperator:
        return columns_of(self, names)


class TransposedLinearOperator(RectangularLinearOperator):
    """J^T of a Jacobian that knows both products.

    Args:
        base: J.
        info: what is known besides the numbers.
    """

    def __init__(self, base: Any, *, info: Info | None = None) -> None:
        super().__init__(base, info=info)
        self.base = base

    def _size(self) -> torch.Size:
        return torch.Size((self.base.shape[-1], self.base.shape[-2]))

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        base: BaseLinearOperator = self.base
        return base

    def _apply(self, v: Tensor) -> Tensor:
        product: Tensor = self.base._apply_transposed(v)
        return product


def columns_of(J: BaseLinearOperator, names: tuple[str, ...]) -> BaseLinearOperator:
    """The columns of some parameters."""
    if J.space is None or names == J.space.names:
        return J
    rows = torch.arange(J.shape[-2], device=J.device)
    columns = flat_positions(J.space, names, J.device)
    return RestrictedLinearOperator(J, rows, columns, info=J.info.restrict(names))


def _apply(function: Map, v: Tensor, parameters: Tensor) -> Tensor:
    wide, back = flattened(v)
    return back(apply_map(function, wide, parameters))
