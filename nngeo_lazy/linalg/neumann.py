"""The Neumann series of an inverse, cut off after some terms, on closures."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NotPositiveDefiniteError
from .krylov import KrylovResult, Matvec, norms, require_finite, scaled

__all__ = ["neumann"]

_GROWTH = 1.01  # of a term beside the smallest one before; more than rounding


def neumann(
    matvec: Matvec, b: Tensor, *, scale: float, terms: int = 100, tol: float | None = None
) -> KrylovResult:
    r"""The Neumann series of A^-1 b for a symmetric A with eigenvalues between 0 and 2 / scale.

    .. math:: A^{-1} b \approx s \sum_{k=0}^{K} (I - s A)^k b, \qquad
        b - A x_K = (I - s A)^{K + 1} b

    In the direction of an eigenvalue a, what is left is (1 - s a)^(K + 1). No term is larger than
    the one before it, as long as the eigenvalues lie there; the first that is larger raises.

    Args:
        matvec: v (n, k) to A v.
        b: the right-hand sides (n, k).
        scale: s.
        terms: K, how many products at most.
        tol: relative residual at which it ends earlier; by default all terms are taken.

    Returns:
        The solution (n, k), with the residual of each column. It has converged if a tolerance was
        given and is reached.

    Raises:
        NotPositiveDefiniteError: the terms grow: an eigenvalue is negative, or above 2 / scale.
        NonFiniteError: NaN or infinity in b or a product.

    Example:
        >>> A = torch.diag(torch.tensor([0.5, 1.0]))
        >>> neumann(lambda v: A @ v, torch.ones(2, 1), scale=1.0, terms=3).x.squeeze(1)
        tensor([1.8750, 1.0000])

    Source:
        Lorraine, Vicol and Duvenaud (2020), Optimizing millions of hyperparameters by implicit
        differentiation, section 3.
    """
    term, sizes = scaled(b, "the Neumann series")
    x = term
    smallest, k = norms(term.detach()), 0
    while True:
        k += 1
        term = term - scale * matvec(term)
        residual = norms(term.detach())
        require_finite(residual, "a product with the matrix", "the Neumann series")
        if bool((residual > _GROWTH * smallest).any()):
            raise NotPositiveDefiniteError(
                f"the Neumann series diverges: term {k} is larger than one before it, so that an "
                f"eigenvalue is negative or above 2 / scale = {2 / scale:.6g}: take a smaller "
                "scale=, damping=, or method='cg'"
            )
        smallest = torch.minimum(smallest, residual)
        reached = tol is not None and bool((residual <= tol).all())
        if reached or k > terms:  # the last product is for the residual alone
            return KrylovResult(scale * x * sizes, k, residual.squeeze(0), reached)
        x = x + term
