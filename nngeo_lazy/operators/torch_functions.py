"""Torch functions on our operators, beyond those that linear_operator registers.

A registry of our own: linear_operator's is global and maps to method names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UnsupportedLayerError

__all__ = ["TORCH_FUNCTIONS"]


def _solve(A: Any, b: Any, *, left: bool = True) -> Any:
    return A.solve(b) if left else A.mT.solve(b.mT).mT


class Slogdet(NamedTuple):
    """As `torch.linalg.slogdet` returns it."""

    sign: Tensor
    logabsdet: Tensor


def _slogdet(A: Any) -> Slogdet:
    try:
        values, _ = A._symeig()
    except UnsupportedLayerError:  # a logdet is defined if no eigenvalue is negative
        found = A.logdet()
        return Slogdet((found > -torch.inf).to(found), found)
    return Slogdet(values.sign().prod(-1), values.abs().log().sum(-1))


def _det(A: Any) -> Tensor:
    sign, logabsdet = _slogdet(A)
    return sign * logabsdet.exp()


def _norm(A: Any, ord: Any = None, dim: Any = None, keepdim: bool = False) -> Tensor:
    if dim not in (None, (-2, -1), (0, 1), [-2, -1], [0, 1]) or keepdim:
        raise NotImplementedError("norms of an operator are over the whole matrix")
    value: Tensor = A.norm("fro" if ord is None else ord)
    return value


def _pinv(
    A: Any, *, atol: float | None = None, rtol: float | None = None, hermitian: bool = True
) -> Any:
    return A.pinv(rtol, atol=atol)


TORCH_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.linalg.solve: _solve,
    torch.trace: lambda A: A.trace(),
    torch.mv: lambda A, v: A.matmul(v),
    torch.mm: lambda A, B: A.matmul(B),
    torch.linalg.slogdet: _slogdet,
    torch.slogdet: _slogdet,
    torch.det: _det,
    torch.linalg.det: _det,
    torch.linalg.norm: _norm,
    torch.linalg.matrix_norm: _norm,
    torch.linalg.inv: lambda A: A.inverse(),
    torch.linalg.pinv: _pinv,
    torch.pinverse: lambda A, rcond=None: A.pinv(rcond),
    torch.linalg.matrix_power: lambda A, n: A.power(n),
    torch.matrix_power: lambda A, n: A.power(n),
    torch.neg: lambda A: -A,
    torch.numel: lambda A: A.shape.numel(),
}
