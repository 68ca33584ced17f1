"""Preconditioned conjugate gradients on closures, column by column."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import NonFiniteError, NotPositiveDefiniteError
from .krylov import (
    IndefinitePreconditionerError,
    KrylovResult,
    Matvec,
    default_tolerance,
    norms,
    refined,
    require_finite,
    scaled,
)

__all__ = ["cg"]

_METHOD = "conjugate gradients"
_REMEDIES: dict[str, tuple[type[NotPositiveDefiniteError], str]] = {
    "the matrix": (
        NotPositiveDefiniteError,
        "add damping= above the size of its most negative eigenvalue, or take "
        "ng.solve(..., method='minres')",
    ),
    "the preconditioner": (
        IndefinitePreconditionerError,
        "pass one that is, such as a damped 'kfac' or 'diagonal', or none",
    ),
}


def cg(
    matvec: Matvec,
    b: Tensor,
    *,
    tol: float | None = None,
    max_iter: int | None = None,
    preconditioner: Matvec | None = None,
    x0: Tensor | None = None,
) -> KrylovResult:
    """Solve A x = b for a symmetric positive definite A, to a relative residual.

    Every column is divided by its norm first, and stops on its own. No tolerance is absolute, so
    that results are the same at any scale of A and of b. When the recurrence says that it has
    converged, the true residual is computed; if that is too large, the iteration starts again from
    the current x.

    Args:
        matvec: v (n, k) to A v (n, k).
        b: the right-hand sides (n, k).
        tol: relative residual to reach; 1e-6 in float32, 1e-10 in float64.
        max_iter: at most so many products with A; by default 10 n, at least 100.
        preconditioner: r (n, k) to an approximation of A^-1 r, symmetric positive definite.
        x0: the start (n, k); by default zero.

    Returns:
        The solution (n, k), with the true relative residual of each column.

    Raises:
        NotPositiveDefiniteError: A or the preconditioner has a direction of negative curvature.
        NonFiniteError: NaN or infinity in b, x0 or a product with A.

    Example:
        >>> A = torch.diag(torch.tensor([1e-12, 3e-12], dtype=torch.float64))
        >>> result = cg(lambda v: A @ v, torch.ones(2, 1, dtype=torch.float64))
        >>> result.converged, result.iterations
        (True, 2)

    Source: Saad (2003), Iterative Methods for Sparse Linear Systems, algorithm 9.1.
    """
    tol = default_tolerance(b.dtype) if tol is None else tol
    max_iter = max(10 * b.shape[0], 100) if max_iter is None else max_iter
    unit, sizes = scaled(b, _METHOD)
    x = torch.zeros_like(unit) if x0 is None else x0 / sizes
    r = unit if x0 is None else unit - matvec(x)
    found = refined(
        lambda x: unit - matvec(x),
        lambda r: norms(r).squeeze(0),
        lambda r, tol, most: _descend(matvec, r, tol, most, preconditioner),
        x,
        r,
        tol,
        max_iter,
    )
    return replace(found, x=found.x * sizes)


def _descend(
    matvec: Matvec, r: Tensor, tol: float, max_iter: int, preconditioner: Matvec | None
) -> tuple[Tensor, int]:
    """CG from zero for the right-hand sides r, to residuals of size tol."""
    tol = max(tol, torch.finfo(r.dtype).eps / 100)  # below rounding the recurrence means nothing
    live = norms(r) > tol
    require_finite(norms(r), "a product with the matrix", _METHOD)
    x, p = torch.zeros_like(r), torch.zeros_like(r)
    rz = torch.ones_like(live, dtype=x.dtype)
    for iteration in range(max_iter):
        if not bool(live.any()):
            return x, iteration
        z = r if preconditioner is None else preconditioner(r)
        rz_new = (r * z).sum(0, keepdim=True)
        _require_positive(rz_new, live, "the preconditioner")
        p = z + p * torch.where(live, rz_new / rz, 0.0)
        rz = torch.where(live, rz_new, 1.0)
        ap = matvec(p)
        curvature = (p * ap).sum(0, keepdim=True)
        _require_positive(curvature, live, "the matrix")
        step = torch.where(live, rz / torch.where(live, curvature, 1.0), 0.0)
        x = x + step * p
        r = r - step * ap
        live = live & (norms(r) > tol)
    return x, max_iter


def _require_positive(curvature: Tensor, live: Tensor, what: str) -> None:
    inside = curvature[live]
    if not bool(inside.isfinite().all()):
        raise NonFiniteError(f"conjugate gradients: NaN or infinity in a product with {what}")
    if bool((inside <= 0).any()):
        kind, remedy = _REMEDIES[what]
        raise kind(
            f"conjugate gradients: {what} is not positive definite (for one vector, v.Av = "
            f"{float(inside.min()):.3g}): {remedy}"
        )
