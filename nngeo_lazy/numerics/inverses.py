"""`inverse`: a lazy inverse by an iteration of one's choice."""

from __future__ import annotations

from typing import Any

import torch

from ..arguments import NonNegativeInt, checked
from ..errors import UnsupportedLayerError, wrong_option
from ..operators.base import BaseLinearOperator
from ..operators.convert import aslinearoperator
from ..operators.damping import DampingLike, is_zero
from ..operators.dense import MatrixLinearOperator
from ..operators.iterated import NAMES, IteratedInverseLinearOperator
from .spectra import eigsh

__all__ = ["inverse"]


@checked
def inverse(
    A: Any,
    *,
    method: str,
    damping: DampingLike = 0.0,
    tol: float | None = None,
    max_iter: NonNegativeInt | None = None,
    terms: NonNegativeInt = 100,
    scale: float | None = None,
) -> BaseLinearOperator:
    r"""(A + damping)^-1 by an iteration of one's choice, as a lazy operator.

    `F.inverse()` chooses by itself, and has a closed form if there is one.

    .. math:: A^{-1} \approx s \sum_{k=0}^{K} (I - s A)^k \quad\text{(neumann)}, \qquad
        (A^T A + d)^{-1} A^T \quad\text{(lsmr)}

    Args:
        A: an operator (n x n), or (m x n) for "lsmr"; a tensor, or anything that
            `aslinearoperator` takes.
        method: "cg" (A positive definite), "minres" (A symmetric), "lsmr" (any A: the pseudo-
            inverse), or "neumann": a polynomial of A, which converges if all eigenvalues lie
            between 0 and 2 / scale.
        damping: as of `solve`: in the units of A, for "lsmr" a number in those of A^T A.
        tol: relative residual of each product. By default 1e-6, in float64 1e-10; a Neumann series
            then takes all its terms, whatever its residual is.
        max_iter: at most so many iterations of a product; not for "neumann".
        terms: K, for "neumann".
        scale: s, for "neumann"; by default 1 / the largest eigenvalue, from `eigsh`.

    Returns:
        The operator, (n x m). Each product is one run of the iteration. It warns with a
        `ConvergenceWarning` if a tolerance is not reached.

    Raises:
        NotPositiveDefiniteError: in a product: "cg" meets negative curvature, or the terms of a
            series grow, so that it would diverge.
        ValueError: an unknown method; settings of another one; A does not fit it.

    Example:
        >>> A = torch.diag(torch.tensor([0.5, 1.0]))
        >>> inverse(A, method="neumann", scale=1.0, terms=3) @ torch.ones(2)
        tensor([1.8750, 1.0000])
        >>> inverse(torch.tensor([[2.0, 0.0], [0.0, 4.0], [0.0, 0.0]]), method="lsmr").to_dense()
        tensor([[0.5000, 0.0000, 0.0000],
                [0.0000, 0.2500, 0.0000]])

    Source:
        Lorraine, Vicol and Duvenaud (2020), Optimizing millions of hyperparameters by implicit
        differentiation; Fong and Saunders (2011) for LSMR.
    """
    if method not in NAMES:
        raise ValueError(wrong_option("method", method, tuple(NAMES), "matrix_free"))
    operator = aslinearoperator(A)
    if method == "lsmr":
        if not isinstance(damping, (int, float)):
            raise ValueError(
                f"method 'lsmr' takes a number as damping=, got {type(damping).__name__}"
            )
        settings = {"damping": float(damping), "tol": tol, "max_iter": max_iter}
        return IteratedInverseLinearOperator(operator, method=method, settings=settings)
    if not operator.is_square or isinstance(operator, MatrixLinearOperator):
        raise ValueError(
            f"method {method!r} needs a symmetric matrix, got {tuple(operator.shape)}: take 'lsmr'"
        )
    damped = operator if is_zero(damping) else operator.damped(damping)
    info = damped.info
    if method != "neumann":
        settings = {"tol": tol, "max_iter": max_iter}
        return IteratedInverseLinearOperator(damped, method=method, settings=settings, info=info)
    if max_iter is not None:
        raise ValueError("a Neumann series takes terms= in place of max_iter=")
    if scale is None:
        with torch.no_grad():
            scale = 1 / _largest(damped)
    elif not scale > 0:
        raise ValueError(f"expected scale= to be positive, got {scale}: leave it out")
    settings = {"scale": scale, "terms": terms, "tol": tol}
    return IteratedInverseLinearOperator(damped, method=method, settings=settings, info=info)


def _largest(A: BaseLinearOperator) -> float:
    """The largest eigenvalue, with what the search left open."""
    found = eigsh(A, 1, tol=1e-2)
    value = float(found.eigenvalues[0] + found.residuals[0])
    if not value > 0:
        raise UnsupportedLayerError(
            f"a Neumann series needs a positive definite matrix, but the largest eigenvalue is "
            f"{value:.3g}: add damping="
        )
    return value
