"""Orthonormal blocks, and the options of the searches that hold them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .krylov import Matvec, norms, seeded

__all__ = [
    "Search",
    "inner",
    "orthogonalised",
    "orthonormal",
    "random_block",
    "require_symmetric",
    "require_symmetric_products",
    "rounding_of",
]

_CHUNK = 4096  # rows whose products are added up one after the other


@dataclass(frozen=True)
class Search:
    """How a search for eigenvectors or singular vectors is made.

    Attributes:
        tol: relative residual to reach; by default 1e-6 in float32, 1e-10 in float64.
        subspace: how many vectors are held; by default max(2 k, k + 30), and for eigenvectors two
            blocks more.
        start: vectors to start from (n,) or (n, j), such as earlier ones. They are added up to as
            many as a block has.
        max_matvecs: at most so many products before the residuals are computed; by default 10
            products for each row, for singular values 20 for each of the smaller side, at least
            1,000.
        seed: of the random start; by default it comes from torch's global generator.
        progress: whether to show a progress bar.

    Example:
        >>> Search(tol=1e-8, seed=0).tol
        1e-08
    """

    tol: float | None = None
    subspace: int | None = None
    start: Tensor | None = None
    max_matvecs: int | None = None
    seed: int | None = None
    progress: bool = False

    def generator(self, device: torch.device) -> torch.Generator | None:
        """A new generator with the seed; None, torch's global one, without a seed."""
        return seeded(self.seed, device)


def random_block(n: int, b: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Normal numbers (n, b), of the dtype and on the device of `like`."""
    return torch.randn(n, b, dtype=like.dtype, device=like.device, generator=generator)


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


def rounding_of(matvec: Matvec, n: int, like: Tensor) -> float:
    """What is rounding in the products of vectors of length 1: 16 times what is not linear.

    A difference of two equal matrices is not zero but rounding, which is neither linear nor
    symmetric. Relative to its own size everything about it is wrong.

    Args:
        matvec: v (n, b) to A v.
        n: the size of the vectors.
        like: a tensor of their dtype and device.
    """
    x, y = (_unit_columns(n, like, seed) for seed in (1, 2))
    apart = matvec(x + y) - matvec(x) - matvec(y)
    return 16 * float(norms(apart).max())


def _unit_columns(n: int, like: Tensor, seed: int) -> Tensor:
    """Four random columns (n, 4) of length 1."""
    block = random_block(n, 4, like, seeded(seed, like.device))
    return block / norms(block)


def require_symmetric(
    inside: Tensor,
    coupling: Tensor,
    corner: Tensor,
    norm: float,
    dtype: torch.dtype,
    method: str,
    rounding: Callable[[], float],
    remedy: str = "take svds, or A^T A",
) -> None:
    """Raise if V^T (A Q) is not (A V)^T Q. This costs no product.

    Args:
        inside: V^T (A Q).
        coupling: (A V)^T Q.
        corner: Q^T A Q.
        norm: a lower bound of |A|.
        dtype: the dtype of the products.
        method: the method that uses them, for messages.
        rounding: what is rounding, see `rounding_of`; it is asked if the two differ.
        remedy: what to do instead, for the message.

    Raises:
        ValueError: the matrix is not symmetric.
    """
    largest = float((corner - corner.mT).abs().max())
    if inside.numel():
        largest = max(largest, float((inside - coupling).abs().max()))
    if largest > (1e-6 if dtype == torch.float64 else 1e-2) * norm and largest > rounding():
        raise ValueError(
            f"{method} needs a symmetric matrix: here u.Av and Au.v differ by {largest:.2g}, with "
            f"|A| = {norm:.2g}: {remedy}"
        )


def require_symmetric_products(
    matvec: Matvec,
    n: int,
    like: Tensor,
    method: str,
    remedy: str = "take ng.solve(A, b, method='lsmr'), or solve with A.mT @ A and A.mT @ b",
) -> None:
    """Raise if products with a few random vectors are not those of a symmetric matrix.

    Args:
        matvec: v (n, k) to A v.
        n: the size of A.
        like: a tensor of its dtype and device.
        method: what needs a symmetric matrix, for the message.
        remedy: what to do instead, for the message.

    Raises:
        ValueError: the matrix is not symmetric.

    Example:
        >>> import torch
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> require_symmetric_products(lambda v: A @ v, 2, A, "solve")
    """
    with torch.no_grad():
        block = _unit_columns(n, like, 1)
        products = matvec(block)
        corner, norm = block.mT @ products, float(norms(products).max())
        none = corner[:0]
        rounding = partial(rounding_of, matvec, n, like)
        require_symmetric(none, none, corner, norm, like.dtype, method, rounding, remedy)
