"""Orthonormal blocks, and the check that comes with them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inner", "orthogonalised", "orthonormal", "random_block", "require_symmetric"]

_CHUNK = 4096  # rows whose products are added up one after the other


def random_block(
    n: int,
    b: int,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator | None,
) -> Tensor:
    """Normal numbers (n, b)."""
    return torch.randn(n, b, dtype=dtype, device=device, generator=generator)


def orthonormal(block: Tensor) -> Tensor:
    """An orthonormal basis of the span of the columns (n, b)."""
    basis: Tensor = torch.linalg.qr(block).Q
    return basis


def inner(X: Tensor, Y: Tensor) -> Tensor:
    """X^T Y (a, b) for X (n, a) and Y (n, b), in float32 added up in chunks of rows.

    A product adds up its n terms one after the other on some devices. For a million float32 terms
    that loses four of seven digits, and vectors from it are not orthogonal.
    """
    whole = len(X) // _CHUNK * _CHUNK
    if whole == 0 or X.dtype == torch.float64:
        return X.mT @ Y
    x, y = (v[:whole].unflatten(0, (-1, _CHUNK)) for v in (X, Y))
    total: Tensor = (x.mT @ y).sum(0) + X[whole:].mT @ Y[whole:]
    return total


def orthogonalised(W: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The part of W (n, b) orthogonal to a basis (n, m), and its coefficients (m, b) inside.

    Two passes are enough (Parlett 1980).
    """
    inside = inner(basis, W)
    W = W - basis @ inside
    again = inner(basis, W)
    return W - basis @ again, inside + again


def require_symmetric(
    inside: Tensor, coupling: Tensor, corner: Tensor, norm: float, dtype: torch.dtype, method: str
) -> None:
    """Raise where V^T (A Q) is not (A V)^T Q, which costs no product.

    Args:
        inside: V^T A Q.
        coupling: what symmetry makes of it.
        corner: Q^T A Q.
        norm: |A|, from below.
        dtype: that the products were made in.
        method: what uses it, for messages.
    """
    largest = float((corner - corner.mT).abs().max())
    if inside.numel():
        largest = max(largest, float((inside - coupling).abs().max()))
    if largest > (1e-6 if dtype == torch.float64 else 1e-2) * norm:
        raise ValueError(
            f"{method} needs a symmetric matrix: here u.Av and Au.v differ by {largest:.2g}, of "
            f"|A| = {norm:.2g}. For another one take svds, or A^T A"
        )
