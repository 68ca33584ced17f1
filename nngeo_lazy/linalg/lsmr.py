"""Least squares on closures, column by column: for rectangular matrices."""

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

__all__ = ["lsmr"]

_METHOD = "least squares"


def lsmr(
    matvec: Matvec,
    rmatvec: Matvec,
    b: Tensor,
    *,
    damping: float = 0.0,
    tol: float | None = None,
    max_iter: int | None = None,
    x0: Tensor | None = None,
) -> KrylovResult:
    """The x that minimises |A x - b|^2 + damping |x|^2: (A^T A + damping) x = A^T b.

    If several x minimise, the start x0 = 0 gives the one of least norm. Each iteration takes one
    product with A and one with A^T. Columns, scales and restarts are those of `cg`. The residual is
    that of the normal equations, |A^T (b - A x) - damping x| / |A^T b|.

    Args:
        matvec: v (n, k) to A v (m, k).
        rmatvec: u (m, k) to A^T u (n, k).
        b: the right-hand sides (m, k).
        damping: a number in the units of A^T A; it is not squared.
        tol: relative residual to reach; 1e-6 in float32, 1e-10 in float64.
        max_iter: at most so many iterations; by default 10 times the smaller side, at least 100.
        x0: the start (n, k); by default zero.

    Returns:
        The solution (n, k), with the residual of each column.

    Raises:
        NotPositiveDefiniteError: negative damping.
        NonFiniteError: NaN or infinity in b, x0 or a product.

    Example:
        >>> A = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
        >>> lsmr(lambda v: A @ v, lambda u: A.mT @ u, torch.ones(3, 1, dtype=torch.float64)).x
        tensor([[1.0000],
                [0.5000]], dtype=torch.float64)

    Source:
        Fong and Saunders (2011), LSMR: An iterative algorithm for sparse least-squares problems.
    """
    if not damping >= 0:
        raise NotPositiveDefiniteError(
            f"expected damping >= 0 for least squares, got {damping}: take one that is not negative"
        )
    tol = default_tolerance(b.dtype) if tol is None else tol
    unit, sizes = scaled(b, _METHOD)
    m, root = b.shape[0], damping**0.5
    gradient = rmatvec(unit)
    require_finite(norms(gradient), "a product with the matrix", _METHOD)
    x = torch.zeros_like(gradient) if x0 is None else x0 / sizes
    max_iter = max(10 * min(m, x.shape[0]), 100) if max_iter is None else max_iter

    def wide(v: Tensor) -> Tensor:  # [A; sqrt(damping) I]: plain least squares with more rows
        return matvec(v) if damping == 0 else torch.cat([matvec(v), root * v])

    def tall(u: Tensor) -> Tensor:
        return rmatvec(u) if damping == 0 else rmatvec(u[:m]) + root * u[m:]

    whole = unit if damping == 0 else torch.cat([unit, torch.zeros_like(x)])
    first = norms(gradient)
    safe = torch.where(first == 0, 1.0, first)
    r = whole if x0 is None else whole - wide(x)
    found = refined(
        lambda x: whole - wide(x),
        lambda r: (norms(tall(r)) / safe).squeeze(0),
        lambda r, tol, most: _descend(wide, tall, r, tol * first, most),
        x,
        r,
        tol,
        max_iter,
        margin=0.5,
    )
    return replace(found, x=found.x * sizes)


def _descend(
    matvec: Matvec, rmatvec: Matvec, b: Tensor, target: Tensor, max_iter: int
) -> tuple[Tensor, int]:
    """LSMR from zero, until |A^T r| of every column is at most its target (1, k).

    Each step has a Golub-Kahan bidiagonalisation and two rotations: that of LSQR, and one that
    makes |A^T r| fall.
    """
    eps = torch.finfo(b.dtype).eps
    size = beta = norms(b)
    u = b / _safe(beta)
    v = rmatvec(u)
    alpha = norms(v)
    require_finite(alpha, "a product with the matrix", _METHOD)
    v = v / _safe(alpha)
    zetabar, alphabar = alpha * beta, alpha
    live = (zetabar > target) & (zetabar > 0)
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    rho, rhobar, cbar, sbar = one, one, one, zero
    x, h, hbar = torch.zeros_like(v), v, torch.zeros_like(v)
    largest = alpha
    for iteration in range(max_iter):
        if not bool(live.any()):
            return x, iteration
        u = matvec(v) - alpha * u
        beta = norms(u)
        u = u / _safe(beta)
        v = rmatvec(u) - beta * v
        alpha = norms(v)
        if not bool((alpha + beta)[live].isfinite().all()):
            raise NonFiniteError(f"{_METHOD}: NaN or infinity in a product with the matrix")
        v = v / _safe(alpha)
        largest = torch.maximum(largest, torch.maximum(alpha, beta))
        rho_old, rho = rho, torch.hypot(alphabar, beta)
        c, s = alphabar / _safe(rho), beta / _safe(rho)
        theta, alphabar = s * alpha, c * alpha
        thetabar, rhobar_old = sbar * rho, rhobar
        rhobar = torch.hypot(cbar * rho, theta)
        cbar, sbar = cbar * rho / _safe(rhobar), theta / _safe(rhobar)
        zeta, zetabar = cbar * zetabar, -sbar * zetabar
        hbar = h - hbar * (thetabar * rho / _safe(rho_old * rhobar_old))
        x = x + torch.where(live, zeta / _safe(rho * rhobar) * hbar, 0.0)
        h = v - h * (theta / _safe(rho))
        exhausted = (alpha <= eps * largest) | (beta <= eps * largest)
        # below rounding the recurrence means nothing
        reached = zetabar.abs() <= torch.maximum(target, eps / 100 * largest * size)
        live = live & ~reached & ~exhausted
    return x, max_iter


def _safe(x: Tensor) -> Tensor:
    return torch.where(x == 0, 1.0, x)
