"""Preconditioned minimal residuals on closures, column by column: for indefinite matrices."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import NonFiniteError
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

__all__ = ["minres"]

_METHOD = "minimal residuals"
_PATIENCE = 20  # with those done so far: iterations to wait before r counts as a null vector


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

    The residual never grows, in the norm of the preconditioner. Columns, scales and restarts are
    those of `cg`. The preconditioner must be positive definite, A need not be.

    Args:
        matvec: v (n, k) to A v (n, k).
        b: the right-hand sides (n, k).
        tol: relative residual to reach; 1e-6 in float32, 1e-10 in float64.
        max_iter: at most so many products with A; by default 10 n, at least 100.
        preconditioner: r (n, k) to M^-1 r, M positive definite and near |A|.
        x0: the start (n, k); by default zero.

    Returns:
        The solution (n, k), with the true relative residual of each column.

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
    largest = torch.zeros_like(sizes)
    found = refined(
        lambda x: unit - matvec(x),
        lambda r: norms(r).squeeze(0),
        lambda r, tol, most: _descend(matvec, r, tol, most, preconditioner, largest),
        x,
        r,
        tol,
        max_iter,
        margin=0.5,
    )
    return replace(found, x=found.x * sizes)


def _descend(
    matvec: Matvec,
    b: Tensor,
    tol: float,
    max_iter: int,
    preconditioner: Matvec | None,
    largest: Tensor,
) -> tuple[Tensor, int]:
    """MINRES from zero for the right-hand sides b, to residuals of size tol.

    The Lanczos vectors v satisfy beta v_{k+1} = A v_k - alpha v_k - beta v_{k-1}. One rotation
    (c, s) a step makes a QR factorisation of their tridiagonal matrix. `largest` (1, k) is a lower
    bound of |A| that is kept from one call to the next.

    If |A r| falls below sqrt(eps) |A| |r|, r may be in the null space. Further steps would then add
    null vectors without bound. So this x is held, and returned unless the residual soon falls by
    half.
    """
    eps = torch.finfo(b.dtype).eps
    tol = max(tol, eps / 100)  # below rounding the recurrence means nothing
    live = norms(b) > tol
    require_finite(norms(b), "a product with the matrix", _METHOD)
    r_old, r = torch.zeros_like(b), b
    y = r if preconditioner is None else preconditioner(r)
    beta = _root(r, y, live, first=True)
    residual, size = b, norms(b)  # phi is the size in the norm of M^-1
    phi = torch.where(live, beta, 0.0)
    one, zero = torch.ones_like(beta), torch.zeros_like(beta)
    c, s, beta_old, delta, epsilon = -one, zero, zero, zero, zero
    x, w, w_old = torch.zeros_like(b), torch.zeros_like(b), torch.zeros_like(b)
    held, kept, size_kept, since = torch.zeros_like(live), x, zero, zero
    least = torch.full_like(one, torch.inf)
    plain = zero  # a lower bound of |A|; `largest` is one of |M^-1/2 A M^-1/2|
    for iteration in range(max_iter):
        if not bool(live.any()):
            return torch.where(held, kept, x), iteration
        v = torch.where(live, y / _safe(beta), 0.0)
        y = matvec(v)
        _require_products(y, live)
        plain = torch.maximum(plain, norms(y) / _safe(norms(v)))
        y = y - r_old * torch.where(live, beta / _safe(beta_old), 0.0)
        alpha = (v * y).sum(0, keepdim=True)
        y = y - r * (alpha / _safe(beta))
        r_old, r = r, y
        beta_old = beta
        y = r if preconditioner is None else preconditioner(r)
        beta = _root(r, y, live)
        # the rotation of the last step, then the one of this
        delta_bar, epsilon_new = c * delta + s * alpha, s * beta
        gamma_bar, delta_new = s * delta - c * alpha, -c * beta
        gamma = torch.hypot(gamma_bar, beta)
        largest.copy_(torch.maximum(largest, torch.maximum(gamma, alpha.abs())))
        # |A r| = |r| hypot(gamma_bar, delta_new), with r from before this step
        null = torch.hypot(gamma_bar, delta_new) <= eps**0.5 * largest
        meets = live & null & ~held
        kept, size_kept = torch.where(meets, x, kept), torch.where(meets, size, size_kept)
        since, held = torch.where(meets, iteration, since), held | meets
        usable = gamma > eps * largest  # else this direction is in the null space
        safe = torch.where(usable, gamma, 1.0)
        c, s = torch.where(usable, gamma_bar / safe, -1.0), torch.where(usable, beta / safe, 0.0)
        w_new = torch.where(live, (v - w_old * epsilon - w * delta_bar) / safe, 0.0)
        x = x + torch.where(live & usable, c * phi, 0.0) * w_new
        phi = torch.where(usable, s * phi, phi)
        moved = s.square() * residual - r * (c * phi / _safe(beta))
        residual = torch.where(live & usable, moved, residual)
        size = norms(residual)
        w_old, w = w, w_new
        delta, epsilon = delta_new, epsilon_new
        falls = size <= torch.where(size_kept / 2 > tol, size_kept / 2, tol)
        true = eps * plain * norms(x - kept) <= size_kept / 10  # else only rounding fell
        held = held & ~(live & falls & true)
        # a first step along a null vector shows as one once |A| is known
        least = torch.where(live & usable, torch.minimum(least, gamma), least)
        held = held | (least <= 10 * eps * largest)
        live = live & (least > 10 * eps * largest)
        reached = (size <= tol) | (beta <= eps * largest) | ~usable
        live = live & ~reached & ~(held & (iteration >= 2 * since + _PATIENCE))
    return torch.where(held, kept, x), max_iter


def _root(r: Tensor, y: Tensor, live: Tensor, *, first: bool = False) -> Tensor:
    """sqrt(r . M^-1 r) of each column."""
    square = (r * y).sum(0, keepdim=True)
    inside = square[live]
    if not bool(inside.isfinite().all()):
        raise NonFiniteError(f"{_METHOD}: NaN or infinity in a product with the preconditioner")
    rounding = -torch.finfo(r.dtype).eps * norms(r) * norms(y)
    negative = square <= 0 if first else square < rounding  # later, r may be zero
    if bool(negative[live].any()):
        raise IndefinitePreconditionerError(
            f"{_METHOD}: the preconditioner is not positive definite (for one vector, r.M^-1 r = "
            f"{float(inside.min()):.3g}): pass one that is, such as a damped 'kfac' or 'diagonal', "
            "or none"
        )
    return torch.where(live, square.clamp_min(0).sqrt(), 0.0)


def _require_products(y: Tensor, live: Tensor) -> None:
    if not bool(norms(y)[live].isfinite().all()):
        raise NonFiniteError(f"{_METHOD}: NaN or infinity in a product with the matrix")


def _safe(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 1.0)
