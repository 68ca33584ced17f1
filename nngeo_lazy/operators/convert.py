"""Matrices of other packages as operators of this one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

from ..derivatives.opaque import Map, apply_map
from .algebra import ours
from .base import BaseLinearOperator
from .dense import MatrixLinearOperator
from .info import Info
from .lazy import LazyLinearOperator
from .matrix_free import TransposedLinearOperator
from .scipy import ScipyOperator
from .vectors import flattened

__all__ = ["FromScipyLinearOperator", "aslinearoperator"]


def aslinearoperator(A: Any) -> BaseLinearOperator:
    """Anything that is a matrix as an operator of this package, with all of its members.

    Args:
        A: a tensor, a numpy array, a scipy sparse array, a `scipy.sparse.linalg.LinearOperator`, or
            any linear_operator operator. Arrays share their memory. A scipy operator is taken to be
            symmetric where it is square; tensors and arrays are looked at.

    Returns:
        The operator; itself where it is one of this package, and what `to_scipy` was made from.

    Raises:
        TypeError: something else.

    Example:
        >>> F = aslinearoperator(np.diag([1.0, 4.0]))
        >>> F.solve(torch.tensor([1.0, 2.0], dtype=torch.float64))
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    if isinstance(A, ScipyOperator):
        return A.operator
    if isinstance(A, np.ndarray):
        A = torch.from_numpy(A)
    if isinstance(A, Tensor):
        square = A.dim() == 2 and A.shape[0] == A.shape[1]
        if square and not torch.allclose(A, A.mT, rtol=1e-5, atol=1e-6 * float(A.abs().max())):
            return MatrixLinearOperator(A)
        return ours(A)
    if scipy.sparse.issparse(A):
        A = scipy.sparse.linalg.aslinearoperator(A)
    if isinstance(A, scipy.sparse.linalg.LinearOperator):
        kind = np.promote_types(A.dtype, np.float32)
        like = torch.empty(0, dtype=torch.float64 if kind == np.float64 else torch.float32)
        return FromScipyLinearOperator(like, info=_ScipyInfo(operator=A))
    return ours(A)


@dataclass(frozen=True)
class _ScipyInfo(Info):
    """Info of a scipy operator."""

    operator: Any = None

    def moved(self, dtype: torch.dtype | None, device: Any) -> _ScipyInfo:
        return replace(self)


class FromScipyLinearOperator(LazyLinearOperator):
    """A scipy operator: products on the CPU, differentiable in the vector.

    Args:
        like: an empty tensor that gives dtype and device.
        info: with the operator.
    """

    def __init__(self, like: Tensor, *, info: _ScipyInfo) -> None:
        super().__init__(like, info=info)
        self.like = like

    def _size(self) -> torch.Size:
        known: _ScipyInfo = self.info  # type: ignore[assignment]
        return torch.Size(known.operator.shape)

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        return TransposedLinearOperator(self)

    def _apply(self, v: Tensor) -> Tensor:
        return self._through(v, False)

    def _apply_transposed(self, u: Tensor) -> Tensor:
        return self._through(u, True)

    def _through(self, v: Tensor, transposed: bool) -> Tensor:
        known: _ScipyInfo = self.info  # type: ignore[assignment]
        wide, back = flattened(v)
        return back(apply_map(_Product(known.operator, transposed), wide))

    def _kind(self) -> str:
        return "scipy"


class _Product(Map):
    """V to A V, or A^T V: linear, so that its derivative is the other one."""

    def __init__(self, operator: Any, transposed: bool) -> None:
        self._operator, self._transposed = operator, transposed

    def __call__(self, *tensors: Tensor) -> Tensor:
        (v,) = tensors
        product = self._operator.rmatmat if self._transposed else self._operator.matmat
        made = np.ascontiguousarray(product(v.detach().cpu().numpy()))
        return torch.from_numpy(made).to(v)

    def traced(self, *tensors: Tensor) -> Tensor:
        return apply_map(self, *tensors)

    def pullback(self, k: int) -> Map:
        return _Dropping(_Product(self._operator, not self._transposed))

    def pushforward(self, k: int) -> Map:
        return _Dropping(self)

    def columns(self, k: int) -> bool:
        return True


class _Dropping(Map):
    """(g, v) to the product with g, of which v is no part."""

    def __init__(self, product: _Product) -> None:
        self._product = product

    def __call__(self, *tensors: Tensor) -> Tensor:
        return self._product(tensors[0])

    def traced(self, *tensors: Tensor) -> Tensor:
        return self._product.traced(tensors[0])

    def columns(self, k: int) -> bool:
        return k == 0
