"""Products with a matrix of the data of several processes."""

from __future__ import annotations

from torch import Tensor

from ..collectives import Group, digest
from .opaque import Map, apply_map

__all__ = ["SummedMap"]


class SummedMap(Map):
    """The sum over processes of a map of each one's share; its derivatives are such sums, too.

    All processes call it with the same tensors, so that they all have the same value.
    """

    def __init__(self, inner: Map, group: Group) -> None:
        self._inner, self._group = inner, group

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The value, without a graph."""
        bits = [f"{tuple(t.shape)} {digest(t)}" for t in tensors]
        with self._group.together("a product", *bits):
            value = self._inner(*tensors).contiguous()
        self._group.sum_([value])
        return value

    def traced(self, *tensors: Tensor) -> Tensor:
        """The value, differentiable by autograd in the tensors that require a gradient."""
        return apply_map(self, *tensors)

    def pullback(self, k: int) -> Map:
        """(g, *tensors) to the gradient of <g, value> in tensor k."""
        return SummedMap(self._inner.pullback(k), self._group)

    def pushforward(self, k: int) -> Map:
        """(t, *tensors) to the derivative of the value along t in tensor k."""
        return SummedMap(self._inner.pushforward(k), self._group)

    def columns(self, k: int) -> bool:
        """Whether a batch of tensor k, columns (n, k), is more columns."""
        return self._inner.columns(k)
