"""Preconditioned minimal residuals on closures, column by column: for indefinite matrices."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import NonFiniteError, NotPositiveDefiniteError
from .krylov import (
    KrylovResult,
    Matvec,
    default_tolerance,
    norms,
    refined,
    require_finite,
    scaled,
)

__all__ = ["minres"]

_METHOD = "minimal residuals"


def minres(
    matvec: Matvec,
    b: Tensor,
    *,
    tol: float | None = None,
    max_iter: int | None = None,
    preconditioner: Matvec | None = None,
    x0: Tensor | None = None,
) -> KrylovResult:
    """Solve A x = b for a symmetric A, indefinite or not, to a relative residual.

    The residual never grows, in the norm of the preconditioner. Columns, scales, restarts and
    arguments are those of `cg`; the preconditioner must be positive definite, A need not.

    Args:
        matvec: v (n, k) to A v (n, k).
        b: the right-hand sides (n, k).
        tol: relative residual to reach; 1e-6 in float32, 1e-10 in float64.
        max_iter: at most so many products with A; by default 10 n, at least 100.
        preconditioner: r (n, k) to M^-1 r, M positive definite and near |A|.
        x0: where to start (n, k); zero by default.

    Raises:
        NotPositiveDefiniteError: the preconditioner is not positive definite.
        NonFiniteError: NaN or infinity in b, x0 or a product.

    Example:
        >>> A = torch.diag(torch.tensor([-1.0, 2.0], dtype=torch.float64))
        >>> minres(lambda v: A @ v, torch.ones(2, 1, dtype=torch.float64)).x
        tensor([[-1.0000],
                [ 0.5000]], dtype=torch.float64)

    Source: Paige and Saunders (1975), Solution of sparse indefinite systems of linear equations.
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
    matvec: Matvec, b: Tensor, tol: float, max_iter: int, preconditioner: Matvec | None
) -> tuple[Tensor, int]:
    """MINRES from zero for the right-hand sides b, to residuals of size tol.

    Lanczos vectors v with beta v_{k+1} = A v_k - alpha v_k - beta v_{k-1}, and a QR factorisation
    of their tridiagonal matrix by one rotation (c, s) a step.
    """
    eps = torch.finfo(b.dtype).eps
    require_finite(norms(b), "a product with the matrix", _METHOD)
    live = norms(b) > max(tol, eps / 100)
    if not bool(live.any()):
        return torch.zeros_like(b), 0
    r_old, r = torch.zeros_like(b), b
    y = r if preconditioner is None else preconditioner(r)
    beta = _root(r, y, live)
    # Residuals are known in M^-1's norm: it is brought to the plain one by that of the start.
    ratio = torch.where(live, norms(b) / torch.where(live, beta, 1.0), 0.0)
    phi = torch.where(live, beta, 0.0)
    one, zero = torch.ones_like(beta), torch.zeros_like(beta)
    c, s, beta_old, delta, epsilon = -one, zero, zero, zero, zero
    x, w, w_old = torch.zeros_like(b), torch.zeros_like(b), torch.zeros_like(b)
    largest = zero
    for iteration in range(max_iter):
        if not bool(live.any()):
            return x, iteration
        v = y / torch.where(live, beta, 1.0)
        y = matvec(v)
        _require_products(y, live)
        y = y - r_old * torch.where(live & (beta_old > 0), beta / _safe(beta_old), 0.0)
        alpha = (v * y).sum(0, keepdim=True)
        y = y - r * (alpha / torch.where(live, beta, 1.0))
        r_old, r = r, y
        beta_old = beta
        y = r if preconditioner is None else preconditioner(r)
        beta = _root(r, y, live)
        # the rotation of the last step, then the one of this
        delta_bar, epsilon_new = c * delta + s * alpha, s * beta
        gamma_bar, delta_new = s * delta - c * alpha, -c * beta
        gamma = torch.hypot(gamma_bar, beta)
        largest = torch.maximum(largest, torch.maximum(gamma, alpha.abs()))
        usable = gamma > eps * largest  # else this direction is in the null space
        safe = torch.where(usable, gamma, 1.0)
        c, s = (
            torch.where(usable, gamma_bar / safe, -1.0),
            torch.where(usable, beta / safe, 0.0),
        )
        w_new = (v - w_old * epsilon - w * delta_bar) / safe
        step = torch.where(live & usable, c * phi, 0.0)
        x = x + step * w_new
        phi = torch.where(usable, s * phi, phi)
        w_old, w = w, w_new
        delta, epsilon = delta_new, epsilon_new
        reached = (phi.abs() * ratio <= tol) | (beta <= eps * largest) | ~usable
        live = live & ~reached
    return x, max_iter


def _root(r: Tensor, y: Tensor, live: Tensor) -> Tensor:
    """sqrt(r . M^-1 r) of each column."""
    square = (r * y).sum(0, keepdim=True)
    inside = square[live]
    if not bool(inside.isfinite().all()):
        raise NonFiniteError(f"{_METHOD}: NaN or infinity in a product with the preconditioner")
    rounding = -torch.finfo(r.dtype).eps * norms(r) * norms(y)
    if bool((square < rounding)[live].any()):
        raise NotPositiveDefiniteError(
            f"{_METHOD}: the preconditioner is not positive definite (a vector met on the way has "
            f"r.M^-1 r = {float(inside.min()):.3g}): pass one that is, such as a damped 'kfac' or "
            "'diagonal', or none"
        )
    return torch.where(live, square.clamp_min(0).sqrt(), 0.0)


def _require_products(y: Tensor, live: Tensor) -> None:
    if not bool(norms(y)[live].isfinite().all()):
        raise NonFiniteError(f"{_METHOD}: NaN or infinity in a product with the matrix")


def _safe(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 1.0)
