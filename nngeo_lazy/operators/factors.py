"""Kronecker factors, dense (G, n, n) or diagonal (G, n), applied to one axis of a grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .decompose import eigh, eigvalsh, eps

__all__ = [
    "apply_factors",
    "check_factors",
    "factor_diagonal",
    "factor_eigh",
    "factor_eigvalsh",
    "factor_null",
    "factor_shifted",
    "factor_trace",
    "joint_factors",
]


def check_factors(left: Tensor, right: Tensor, what: str) -> None:
    """Refuse what is not (G, n, n) or (G, n), or has different G."""
    for side, factor in (("left", left), ("right", right)):
        square = factor.dim() == 3 and factor.shape[1] == factor.shape[2]
        if not square and factor.dim() != 2:
            raise ValueError(
                f"expected the {side} {what} as (G, n, n), or (G, n) if it is diagonal, got "
                f"{tuple(factor.shape)}"
            )
    if left.shape[0] != right.shape[0]:
        raise ValueError(
            f"expected as many groups left and right, got {tuple(left.shape)} and "
            f"{tuple(right.shape)}: a single dense matrix is of shape (1, n, n)"
        )
    if left.dtype != right.dtype or left.device != right.device:
        raise ValueError(
            f"expected both {what}s of one dtype and device, got {left.dtype} on {left.device} and "
            f"{right.dtype} on {right.device}"
        )


def apply_factors(left: Tensor, right: Tensor, v: Tensor, *, transposed: bool = False) -> Tensor:
    """(left_g kron right_g) v for columns v (..., G o i, k), row-major (G, o, i)."""
    if v.dim() > 2:  # leading dimensions are more columns: the factors are never repeated
        wide = v.movedim(-2, 0)  # (n, ..., k)
        y = apply_factors(left, right, wide.flatten(1), transposed=transposed)
        return y.reshape(wide.shape).movedim(0, -2)
    groups, o, i, k = left.shape[0], left.shape[1], right.shape[1], v.shape[-1]
    if transposed:
        left, right = (f.mT if f.dim() == 3 else f for f in (left, right))
    y = v.reshape(groups, o, i * k)
    y = left @ y if left.dim() == 3 else left.unsqueeze(-1) * y  # (G,o,o),(G,o,ik) -> (G,o,ik)
    y = y.reshape(groups, o, i, k)
    if right.dim() == 2:
        y = right[:, None, :, None] * y
    else:
        rows = y.transpose(-1, -2).reshape(groups, o * k, i)
        y = (rows @ right.mT).reshape(groups, o, k, i).transpose(-1, -2)  # (G,ok,i),(G,i,i)
    return y.reshape(groups * o * i, k)


def factor_eigh(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (G, n) and eigenvectors (G, n, n); (G, n) of ones if it is diagonal."""
    if factor.dim() == 2:
        return factor.detach(), torch.ones_like(factor, requires_grad=False)
    return eigh(factor)


def factor_eigvalsh(factor: Tensor) -> Tensor:
    """Eigenvalues (G, n) with a gradient, ordered as those of `factor_eigh`."""
    return factor if factor.dim() == 2 else eigvalsh(factor)


def factor_diagonal(factor: Tensor) -> Tensor:
    """(G, n)."""
    return factor if factor.dim() == 2 else factor.diagonal(dim1=-2, dim2=-1)


def factor_trace(factor: Tensor) -> Tensor:
    """(G,)."""
    return factor_diagonal(factor).sum(-1)


def joint_factors(products: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    r"""The Kronecker product with the partial traces of a sum of them.

    .. math:: L = \frac{\sum_j a_j}{\sum_j a_j b_j} \sum_k b_k L_k, \quad
        R = \frac{1}{\sum_j a_j} \sum_k a_k R_k, \quad a_k = tr L_k, \; b_k = tr R_k

    It is the one product if all others are zero, and does not depend on how a product shares its
    scale between its factors.
    """
    a = torch.stack([factor_trace(left) for left, _ in products])  # (K,G)
    b = torch.stack([factor_trace(right) for _, right in products])
    trace, lefts = (a * b).sum(0), a.sum(0)
    scaled = b * torch.where(trace > 0, lefts / trace.where(trace > 0, 1), 0)
    shares = a / lefts.where(lefts > 0, 1)
    return (
        _weighted_sum([left for left, _ in products], scaled),
        _weighted_sum([right for _, right in products], shares),
    )


def _weighted_sum(factors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Of factors (G, n, n) and diagonal ones (G, n), with weights (K, G)."""
    some = any(factor.dim() == 3 for factor in factors)
    wide = [f.diag_embed() if some and f.dim() == 2 else f for f in factors]
    terms = [w.view(-1, *[1] * (f.dim() - 1)) * f for f, w in zip(wide, weights, strict=True)]
    total: Tensor = sum(terms[1:], terms[0])
    return total


def factor_null(values: Tensor, diagonal: bool) -> Tensor:
    """Which eigenvalues (G, n) are zero: up to n eps max (matrix_rank), exactly if diagonal."""
    sizes = values.abs()
    if diagonal or sizes.numel() == 0:
        return sizes == 0
    return sizes <= sizes.shape[-1] * eps(sizes) * sizes.amax(-1, keepdim=True)


def factor_shifted(factor: Tensor, d: Tensor) -> Tensor:
    """factor_g + d_g I, d (G,)."""
    if factor.dim() == 2:
        return factor + d[:, None]
    return factor + d[:, None].expand(factor.shape[:-1]).diag_embed()


def sizes(left: Tensor, right: Tensor) -> str:
    """How a report names the sizes of two factors: "2 x (3x3) x (diagonal 4)"."""
    named = [
        f"{f.shape[1]}x{f.shape[1]}" if f.dim() == 3 else f"diagonal {f.shape[1]}"
        for f in (left, right)
    ]
    many = f"{left.shape[0]} x " if left.shape[0] > 1 else ""
    return f"{many}({named[0]}) x ({named[1]})"
