"""Matrices of other packages as operators of this one."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from linear_operator.operators import (
    ConstantMulLinearOperator,
    DiagLinearOperator,
    LinearOperator,
    MulLinearOperator,
    ZeroLinearOperator,
)
from linear_operator.operators import DenseLinearOperator as TheirDenseLinearOperator
from linear_operator.operators import SumLinearOperator as TheirSumLinearOperator
from scipy.sparse.linalg import aslinearoperator as scipy_operator
from torch import Tensor

from ..derivatives.opaque import Map, apply_map
from . import rules
from .base import BaseLinearOperator
from .dense import DenseLinearOperator, MatrixLinearOperator
from .diagonal import DiagonalLinearOperator
from .info import Info
from .lazy import LazyLinearOperator
from .matrix_free import TransposedLinearOperator
from .scipy import ScipyOperator
from .vectors import flattened, is_symmetric
from .views import ForeignLinearOperator

__all__ = ["FromScipyLinearOperator", "aslinearoperator"]


def aslinearoperator(A: Any) -> BaseLinearOperator:
    """Anything that is a matrix as an operator of this package, with all of its members.

    Args:
        A: a tensor, a numpy array, a scipy sparse array, a `scipy.sparse.linalg.LinearOperator`, or
            any linear_operator operator. Arrays share their memory. A scipy operator is taken to be
            symmetric if it is square; tensors and arrays are looked at.

    Returns:
        The operator; itself if it is one of this package, and what `to_scipy` was made from.

    Raises:
        TypeError: something else.

    Example:
        >>> F = aslinearoperator(np.diag([1.0, 4.0]))
        >>> F.solve(torch.tensor([1.0, 2.0], dtype=torch.float64))
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    if isinstance(A, np.ndarray):
        A = torch.from_numpy(A)
    made: BaseLinearOperator = rules.as_operator(
        scipy_operator(A) if scipy.sparse.issparse(A) else A
    )
    return made


@rules.as_operator.register(object)
def _(A: object) -> BaseLinearOperator:
    raise TypeError(f"expected a tensor or a linear operator, got {type(A).__name__}")


@rules.as_operator.register(BaseLinearOperator)
def _(A: BaseLinearOperator) -> BaseLinearOperator:
    return A


@rules.as_operator.register(Tensor)
def _(A: Tensor) -> BaseLinearOperator:
    if A.dim() < 2:
        raise ValueError(
            f"expected a matrix, got a tensor of shape {tuple(A.shape)}: for a diagonal take "
            "torch.diag(...) or DiagonalLinearOperator(...)"
        )
    if A.dim() > 2:
        return _stacked(A)
    return DenseLinearOperator(A) if is_symmetric(A) else MatrixLinearOperator(A)


def _stacked(A: Tensor | LinearOperator) -> BaseLinearOperator:
    """A batch, each of its matrices with a structure of its own."""
    stack: BaseLinearOperator = rules.stacks([rules.as_operator(A[k]) for k in range(A.shape[0])])
    return stack


@rules.as_operator.register(LinearOperator)
def _(A: LinearOperator) -> BaseLinearOperator:
    # theirs solve a batch loosely
    return ForeignLinearOperator(A) if A.dim() == 2 else _stacked(A)


@rules.as_operator.register(DiagLinearOperator)
def _(A: DiagLinearOperator) -> Any:
    return DiagonalLinearOperator(A._diag) if A.dim() == 2 else NotImplemented


@rules.as_operator.register(ZeroLinearOperator)
def _(A: ZeroLinearOperator) -> Any:  # it holds no tensor
    if A.dim() > 2:
        return NotImplemented
    zero = torch.zeros((), dtype=A.dtype, device=A.device)
    if A.shape[0] == A.shape[1]:
        return DiagonalLinearOperator(zero.expand(A.shape[0]))
    return MatrixLinearOperator(zero.expand(A.shape))


@rules.as_operator.register(MulLinearOperator)
def _(A: MulLinearOperator) -> Any:  # whose own products are with approximate roots
    if A.dim() > 2:
        return NotImplemented
    return rules.as_operator(A.left_linear_op) * rules.as_operator(A.right_linear_op)


@rules.as_operator.register(TheirDenseLinearOperator)
def _(A: TheirDenseLinearOperator) -> Any:
    # a subclass of theirs may mean more than its tensor
    return rules.as_operator(A.tensor) if type(A) is TheirDenseLinearOperator else NotImplemented


@rules.as_operator.register(TheirSumLinearOperator)
def _(A: TheirSumLinearOperator) -> Any:  # also one with a diagonal
    return reduce(add, map(rules.as_operator, A.linear_ops)) if A.dim() == 2 else NotImplemented


@rules.as_operator.register(ConstantMulLinearOperator)
def _(A: ConstantMulLinearOperator) -> Any:
    if type(A) is not ConstantMulLinearOperator or A.dim() != 2:
        return NotImplemented
    return rules.as_operator(A.base_linear_op)._scale(A._constant)


@rules.as_operator.register(ScipyOperator)
def _(A: ScipyOperator) -> BaseLinearOperator:
    return A.operator


@rules.as_operator.register(scipy.sparse.linalg.LinearOperator)
def _(A: scipy.sparse.linalg.LinearOperator) -> BaseLinearOperator:
    wide = np.promote_types(A.dtype, np.float32) == np.float64
    like = torch.empty(0, dtype=torch.float64 if wide else torch.float32, device="cpu")
    return FromScipyLinearOperator(like, operator=A)


class FromScipyLinearOperator(LazyLinearOperator):
    """A scipy operator: products on the CPU, differentiable in the vector.

    Args:
        like: an empty tensor that gives dtype and device.
        operator: the scipy operator.
        info: what is known besides the numbers.
    """

    def __init__(self, like: Tensor, *, operator: Any, info: Info | None = None) -> None:
        super().__init__(like, operator=operator, info=info)
        self.like, self.operator = like, operator

    def _size(self) -> torch.Size:
        return torch.Size(self.operator.shape)

    def _transpose_nonbatch(self) -> BaseLinearOperator:
        return TransposedLinearOperator(self)

    def _apply(self, v: Tensor) -> Tensor:
        return self._through(v, False)

    def _apply_transposed(self, u: Tensor) -> Tensor:
        return self._through(u, True)

    @property
    def known_symmetric(self) -> bool:
        """Nothing is known of it but products."""
        return False

    def _through(self, v: Tensor, transposed: bool) -> Tensor:
        wide, back = flattened(v)
        return back(apply_map(_Product(self.operator, transposed), wide))

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
    """(g, v) to the product with g; it does not read v."""

    def __init__(self, product: _Product) -> None:
        self._product = product

    def __call__(self, *tensors: Tensor) -> Tensor:
        return self._product(tensors[0])

    def traced(self, *tensors: Tensor) -> Tensor:
        return self._product.traced(tensors[0])

    def columns(self, k: int) -> bool:
        return k == 0
