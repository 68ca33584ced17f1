"""Eigendecompositions of symmetric matrices: accurate, named when they fail, never stale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..errors import NonFiniteError

__all__ = ["Decomposition", "eigh", "eigvalsh", "eps", "matrix_power"]

T = TypeVar("T")
SPARSE_SIZE = 64  # from here on rows of zeros are looked for
_HALF = (torch.float16, torch.bfloat16)


def eps(tensor: Tensor) -> float:
    """The relative rounding error of a tensor's dtype."""
    return float(torch.finfo(tensor.dtype).eps)


class Decomposition:
    """What is computed once from some tensors, and again if one of them is modified in place.

    Several operators may hold it: damping by a multiple of the identity changes no eigenvector.
    It travels with an operator that is made again, as long as its tensors are the same.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        self._entries: dict[str, tuple[tuple[int, ...], Any]] = {}

    @classmethod
    def of(cls, known: Decomposition | None, *tensors: Tensor) -> Decomposition:
        """The known one if it is that of these very tensors, else a new one."""
        if known is None or len(known._tensors) != len(tensors):
            return cls(*tensors)
        same = all(a is b for a, b in zip(known._tensors, tensors, strict=True))
        return known if same else cls(*tensors)

    def get(self, key: str, compute: Callable[[], T], *tensors: Tensor) -> T:
        """The result of `compute`, which reads these tensors (by default, all)."""
        read = tensors or self._tensors
        if any(t.is_inference() for t in read):
            return compute()  # they count no modifications
        versions = tuple(t._version for t in read)
        found = self._entries.get(key)
        if found is not None and found[0] == versions:
            value: T = found[1]
            return value
        fresh = compute()
        self._entries[key] = versions, fresh
        return fresh

    def __reduce__(self) -> tuple[type[Decomposition], tuple[Tensor, ...]]:
        return Decomposition, self._tensors  # a pickle holds no derived numbers


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., n), ascending, and eigenvectors (..., n, n), without a graph.

    Half precision is decomposed in float32, and what fails there in float64. Eigenvalues of a
    matrix that is positive semidefinite up to rounding are not negative.

    Raises:
        NonFiniteError: NaN or infinity in the matrix.
    """
    work = _prepared(matrix.detach())
    with torch.no_grad():
        try:
            values, vectors = _without_zeros(work)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            values, vectors = torch.linalg.eigh(work.double())
    return _cleaned(values).to(matrix.dtype), vectors.to(matrix.dtype)


def _without_zeros(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose what is left without rows of exact zeros, such as inputs that are all padding."""
    size = matrix.shape[-1]
    if size < SPARSE_SIZE or matrix.numel() > size * size:
        return cast("tuple[Tensor, Tensor]", torch.linalg.eigh(matrix))
    square = matrix.reshape(size, size)
    zero = (square == 0).all(0)
    rest = (~zero).nonzero().flatten()
    if len(rest) in (0, size):
        return cast("tuple[Tensor, Tensor]", torch.linalg.eigh(matrix))
    some, basis = torch.linalg.eigh(square[rest[:, None], rest])
    values, order = torch.cat([some.new_zeros(size - len(rest)), some]).sort()
    vectors = square.new_zeros(size, size)
    units = torch.arange(size - len(rest), device=square.device)
    vectors[zero.nonzero().flatten(), units] = 1
    vectors[rest[:, None], torch.arange(size - len(rest), size, device=square.device)] = basis
    return values.view(matrix.shape[:-1]), vectors[:, order].view(matrix.shape)


def eigvalsh(matrix: Tensor) -> Tensor:
    """The eigenvalues of `eigh`, with a gradient, also where eigenvalues repeat."""
    work = _prepared(matrix)
    try:
        values = torch.linalg.eigvalsh(work)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        values = torch.linalg.eigvalsh(work.double())
    return _cleaned(values).to(matrix.dtype)


def matrix_power(matrix: Tensor, values: Tensor, vectors: Tensor, p: float) -> Tensor:
    """M^p from M's eigendecomposition, differentiable once in M, also where eigenvalues repeat.

    The derivative is the one of Daleckii and Krein (Higham 2008, Functions of Matrices, thm 3.11).
    """
    return cast(Tensor, cast(Any, _MatrixPower).apply(matrix, values, vectors, p))


class _MatrixPower(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, values: Tensor, vectors: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(values, vectors)
        ctx.p = p
        return (vectors * values.pow(p).unsqueeze(-2)) @ vectors.mT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        values, vectors = ctx.saved_tensors
        p = ctx.p
        a, b = values.unsqueeze(-1), values.unsqueeze(-2)
        # divided differences of x^p, the derivative at the midpoint where the difference cancels
        close = (a - b).abs() <= eps(values) ** 0.5 * torch.maximum(a.abs(), b.abs())
        slope = p * ((a + b) / 2).pow(p - 1)
        gap = torch.where(close, torch.ones_like(slope), a - b)
        divided = torch.where(close, slope, (a.pow(p) - b.pow(p)) / gap)
        inner = vectors.mT @ ((grad + grad.mT) / 2) @ vectors
        return vectors @ (divided * inner) @ vectors.mT, None, None, None


def _prepared(matrix: Tensor) -> Tensor:
    if not bool(matrix.detach().isfinite().all()):
        raise NonFiniteError("NaN or infinity in a matrix that is to be decomposed")
    return matrix.float() if matrix.dtype in _HALF else matrix


def _cleaned(values: Tensor) -> Tensor:
    """Negative eigenvalues set to 0 where all of them are rounding: at least -n eps max."""
    if values.shape[-1] == 0:
        return values
    noise = values.shape[-1] * eps(values) * values.abs().amax(-1, keepdim=True)
    semidefinite = values.amin(-1, keepdim=True) >= -noise
    return torch.where(semidefinite, values.clamp_min(0), values)
