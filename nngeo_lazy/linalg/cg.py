"""Preconditioned conjugate gradients on closures, column by column."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NonFiniteError, NotPositiveDefiniteError

__all__ = ["CGResult", "cg", "default_tolerance"]

Matvec = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class CGResult:
    """What `cg` found.

    Attributes:
        x: the solution (n, k).
        iterations: how many products with A were made inside the iteration.
        residual: the true relative residual |b - A x| / |b| of each column (k,), 0 where b is 0.
        converged: whether every column has reached the tolerance.
        stalled: whether it stopped because rounding keeps the residual above the tolerance.
    """

    x: Tensor
    iterations: int
    residual: Tensor
    converged: bool
    stalled: bool = False


def default_tolerance(dtype: torch.dtype) -> float:
    """The relative residual asked for by default: 1e-10 in float64, else 1e-6."""
    return 1e-10 if dtype == torch.float64 else 1e-6


def cg(
    matvec: Matvec,
    b: Tensor,
    *,
    tol: float | None = None,
    max_iter: int | None = None,
    preconditioner: Matvec | None = None,
    x0: Tensor | None = None,
) -> CGResult:
    """Solve A x = b for a symmetric positive definite A, to a relative residual.

    Every column is divided by its norm first, and stops on its own: no number here is absolute, so
    that results are the same at any scale of A and of b. When the recurrence says that it has
    converged, the true residual is computed; where that disagrees, the iteration starts again from
    the current x.

    Args:
        matvec: v (n, k) to A v (n, k).
        b: the right-hand sides (n, k).
        tol: relative residual to reach; 1e-6 in float32, 1e-10 in float64.
        max_iter: at most so many products with A; by default 10 n, at least 100.
        preconditioner: r (n, k) to an approximation of A^-1 r, symmetric positive definite.
        x0: where to start (n, k); zero by default.

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
    norms = _norms(b)
    _require_finite(norms, "the right-hand side")
    norms = torch.where(norms == 0, torch.ones_like(norms), norms)
    unit = b / norms
    if x0 is None:
        x, r = torch.zeros_like(unit), unit
    else:
        x = x0 / norms
        r = unit - matvec(x)
    iterations, best_x = 0, x
    best: Tensor | None = None
    while True:
        x, done = _descend(matvec, x, r, tol, max_iter - iterations, preconditioner)
        iterations += done
        r = unit - matvec(x)  # the recurrence drifts: only the true residual counts
        residual = _norms(r).squeeze(0)
        before = best
        if best is not None:  # a restart at the limit of rounding may lose a little
            x = torch.where(residual < best, x, best_x)
            residual = torch.minimum(residual, best)
        best, best_x = residual, x
        converged = not bool((residual > tol).any())
        stalled = done == 0 or (
            before is not None and not bool((best <= before / 2)[best > tol].any())
        )
        if converged or stalled or iterations >= max_iter:
            short = not converged and iterations < max_iter
            return CGResult(x * norms, iterations, residual, converged, short)
        r = unit - matvec(x)


def _descend(
    matvec: Matvec,
    x: Tensor,
    r: Tensor,
    tol: float,
    max_iter: int,
    preconditioner: Matvec | None,
) -> tuple[Tensor, int]:
    """CG from x, whose residual is r, for right-hand sides of norm one."""
    tol = max(tol, torch.finfo(x.dtype).eps / 100)  # below rounding the recurrence means nothing
    live = _norms(r) > tol
    _require_finite(_norms(r), "a product with the matrix")
    p = torch.zeros_like(x)
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
        live = live & (_norms(r) > tol)
    return x, max_iter


def _norms(v: Tensor) -> Tensor:
    """Column norms (1, k) that neither overflow nor underflow."""
    scale = v.abs().amax(0, keepdim=True)
    safe = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
    norms: Tensor = torch.linalg.vector_norm(v / safe, dim=0, keepdim=True)
    return norms * safe


def _require_finite(norms: Tensor, what: str) -> None:
    if not bool(norms.isfinite().all()):
        raise NonFiniteError(f"conjugate gradients: NaN or infinity in {what}")


def _require_positive(curvature: Tensor, live: Tensor, what: str) -> None:
    inside = curvature[live]
    if not bool(inside.isfinite().all()):
        raise NonFiniteError(f"conjugate gradients: NaN or infinity in a product with {what}")
    if bool((inside <= 0).any()):
        raise NotPositiveDefiniteError(
            f"conjugate gradients: {what} is not positive definite (a vector met on the way has "
            f"v.Av = {float(inside.min()):.3g}): add damping= above its most negative eigenvalue"
        )
