"""Sums and products of operators: structured where the structures fit, lazy otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from linear_operator.operators import (
    ConstantMulLinearOperator,
    DiagLinearOperator,
    LinearOperator,
)
from linear_operator.operators import DenseLinearOperator as TheirDenseLinearOperator
from linear_operator.operators import SumLinearOperator as TheirSumLinearOperator
from torch import Tensor

from ..errors import SpaceMismatchError
from .base import BaseLinearOperator
from .block_diagonal import BlockDiagonalLinearOperator
from .dense import DenseLinearOperator, MatrixLinearOperator
from .diagonal import DiagonalLinearOperator
from .eigen_kronecker import EigenKroneckerLinearOperator
from .factored import FactoredJacobianLinearOperator
from .info import Info, joint
from .kernel import KernelLinearOperator, kernel_of, rows_of_an_example
from .kronecker import KroneckerLinearOperator
from .lazy import ProductLinearOperator, ScaledLinearOperator, SumLinearOperator
from .low_rank import LowRankLinearOperator
from .matrix_free import JacobianLinearOperator, TransposedLinearOperator
from .stack import StackLinearOperator
from .views import ForeignLinearOperator

__all__ = ["add", "multiply", "ours"]

_CLOSED = (
    DenseLinearOperator,
    DiagonalLinearOperator,
    KroneckerLinearOperator,
    EigenKroneckerLinearOperator,
    LowRankLinearOperator,
)


def ours(A: Any) -> BaseLinearOperator:
    """A tensor or any linear_operator operator as one of ours."""
    if isinstance(A, BaseLinearOperator):
        return A
    if isinstance(A, Tensor):
        if A.dim() == 2 and A.shape[0] == A.shape[1]:
            return DenseLinearOperator(A)
        if A.dim() == 3:
            return StackLinearOperator(*map(ours, A))
        return (
            MatrixLinearOperator(A)
            if A.dim() == 2
            else ForeignLinearOperator(TheirDenseLinearOperator(A))
        )
    if not isinstance(A, LinearOperator):
        raise TypeError(f"expected a tensor or a linear operator, got {type(A).__name__}")
    if isinstance(A, DiagLinearOperator) and A.dim() == 2:
        return DiagonalLinearOperator(A._diag)
    if type(A) is TheirDenseLinearOperator:
        return ours(A.tensor)
    if isinstance(A, TheirSumLinearOperator) and A.dim() == 2:  # also one with a diagonal
        first, *rest = map(ours, A.linear_ops)
        for term in rest:
            first = add(first, term)
        return first
    if type(A) is ConstantMulLinearOperator and A.dim() == 2:
        return ours(A.base_linear_op)._scale(A._constant)
    return ForeignLinearOperator(A)


def add(A: BaseLinearOperator, B: BaseLinearOperator) -> BaseLinearOperator:
    """A + B."""
    if A.shape[-2:] != B.shape[-2:]:
        raise SpaceMismatchError(
            f"expected two matrices of one shape, got {tuple(A.shape)} + {tuple(B.shape)}"
        )
    _require_like(A, B)
    info = joint(A.info, B.info)
    if isinstance(A, DiagonalLinearOperator) and isinstance(B, DiagonalLinearOperator):
        return DiagonalLinearOperator(A.diag + B.diag, info=info)
    for one, other in ((A, B), (B, A)):
        if isinstance(one, DiagonalLinearOperator):
            return _informed(other.add_diagonal(one.diag), info)
        if isinstance(one, DenseLinearOperator) and _closed(other):
            # as much memory again as the dense one takes already
            return DenseLinearOperator(one.tensor + other._dense(), info=info)
    if isinstance(A, BlockDiagonalLinearOperator) and A.same_blocks(B):
        blocks = [add(a, b) for a, b in zip(A.members, B.members, strict=True)]
        return BlockDiagonalLinearOperator(*blocks, info=_richer(A, B))
    if isinstance(A, EigenKroneckerLinearOperator) and A.same_basis(B):
        return A._with_values(A.values + B.values, info)
    if isinstance(A, LowRankLinearOperator) and isinstance(B, LowRankLinearOperator):
        return A.joined(B, info)
    return SumLinearOperator.of(A, B, info=info)


def multiply(A: BaseLinearOperator, B: Any) -> BaseLinearOperator:
    """A @ B."""
    B = ours(B)
    if A.shape[-1] != B.shape[-2]:
        raise SpaceMismatchError(
            f"expected matrices that fit, got {tuple(A.shape)} @ {tuple(B.shape)}"
        )
    _require_like(A, B)
    info = joint(A.info, B.info)
    if B.space is None and not (B.is_square and B.maps_to_parameters):  # it takes no parameters
        info = replace(info, space=None)
    if isinstance(A, DiagonalLinearOperator) and isinstance(B, DiagonalLinearOperator):
        return DiagonalLinearOperator(A.diag * B.diag, info=info)
    if isinstance(A, BlockDiagonalLinearOperator) and A.same_blocks(B):
        blocks = [multiply(a, b) for a, b in zip(A.members, B.members, strict=True)]
        return BlockDiagonalLinearOperator(*blocks, info=_richer(A, B))
    if isinstance(A, EigenKroneckerLinearOperator) and A.same_basis(B):
        return A._with_values(A.values * B.values, info)
    kernel = _kernel(A, B)
    return ProductLinearOperator(A, B, info=info) if kernel is None else kernel


def _kernel(A: BaseLinearOperator, B: BaseLinearOperator) -> BaseLinearOperator | None:
    """J1 M J2^T, however it is put in brackets."""
    factors = [*_factors(A), *_factors(B)]
    first, last = factors[0], factors[-1]
    if not (isinstance(last, TransposedLinearOperator) and len(factors) in (2, 3)):
        return None
    kinds = (JacobianLinearOperator, FactoredJacobianLinearOperator)
    if not (isinstance(first, kinds) and isinstance(last.base, kinds)):
        return None
    if rows_of_an_example(first) != rows_of_an_example(last.base):
        return None  # such as gradients of outputs with those of losses
    return kernel_of(first, last.base, *factors[1:-1])


def _factors(A: BaseLinearOperator) -> tuple[BaseLinearOperator, ...]:
    if isinstance(A, ProductLinearOperator):
        return (*_factors(A.left), *_factors(A.right))
    return (A,)


def _require_like(A: BaseLinearOperator, B: BaseLinearOperator) -> None:
    if A.dtype != B.dtype or A.device != B.device:
        raise SpaceMismatchError(
            f"expected two operators of one dtype and device, got {A.dtype} on {A.device} and "
            f"{B.dtype} on {B.device}: convert one with .to(...)"
        )


def _closed(A: BaseLinearOperator) -> bool:
    """Whether forming A costs no products with vectors."""
    if isinstance(A, BlockDiagonalLinearOperator):
        return all(_closed(member) for member in A.members)
    if isinstance(A, ScaledLinearOperator):
        return _closed(A.base)
    if isinstance(A, KernelLinearOperator):
        return not A.iterates  # it is dense as soon as it is solved
    return isinstance(A, _CLOSED)


def _richer(A: BlockDiagonalLinearOperator, B: BlockDiagonalLinearOperator) -> Info:
    """The info of block-diagonal operators over the same blocks."""
    known = joint(A.info, B.info)
    return replace(
        A.info,
        space=known.space,
        num_examples=known.num_examples,
        num_terms=known.num_terms,
        log_likelihood=known.log_likelihood,
        origins=known.origins,
        quantity={},
    )


def _informed(A: BaseLinearOperator, info: Info) -> BaseLinearOperator:
    """A sum with a diagonal knows the space of either."""
    if A.info.space is not None or info.space is None:
        return A
    if isinstance(A, BlockDiagonalLinearOperator):
        return A
    known: BaseLinearOperator = A._with_info(info)
    return known
