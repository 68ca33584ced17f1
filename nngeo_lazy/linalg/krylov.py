"""What the iterative methods share: their result, tolerances and column norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import NonFiniteError, NotPositiveDefiniteError

__all__ = [
    "IndefinitePreconditionerError",
    "KrylovResult",
    "Matvec",
    "default_tolerance",
    "norms",
    "refined",
    "require_finite",
    "scaled",
]

Matvec: TypeAlias = Callable[[Tensor], Tensor]


class IndefinitePreconditionerError(NotPositiveDefiniteError):
    """The preconditioner, and not the matrix, is not positive definite."""


@dataclass(frozen=True)
class KrylovResult:
    """What an iteration found.

    Attributes:
        x: the solution (n, k).
        iterations: how many products with A were made inside the iteration.
        residual: the true relative residual |b - A x| / |b| of each column (k,), 0 where b is 0;
            of least squares, that of the normal equations.
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


def norms(v: Tensor) -> Tensor:
    """Column norms (1, k) that neither overflow nor underflow.

    `sum` adds pairwise. `torch.linalg.vector_norm` does not: for a million float32 numbers it is
    wrong by 2e-4, and so would be the eigenvalues from vectors of that length.
    """
    scale = v.abs().amax(0, keepdim=True)
    safe = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
    return (v / safe).square().sum(0, keepdim=True).sqrt() * safe


def require_finite(sizes: Tensor, what: str, method: str) -> None:
    """Raise NonFiniteError where the norms of columns are not finite."""
    if not bool(sizes.isfinite().all()):
        raise NonFiniteError(f"{method}: NaN or infinity in {what}")


def refined(
    residual_of: Callable[[Tensor], Tensor],
    size_of: Callable[[Tensor], Tensor],
    descend: Callable[[Tensor, float, int], tuple[Tensor, int]],
    x: Tensor,
    r: Tensor,
    tol: float,
    max_iter: int,
    margin: float = 1.0,
) -> KrylovResult:
    """Iterate until the true residual of every column is small, or cannot become so.

    The recurrences of an iteration drift from the truth: when one says that it has converged, the
    residual is computed, and where that disagrees it starts again from what was found.

    Args:
        residual_of: x (n, k) to the true residual r.
        size_of: r to its relative size (k,).
        descend: (r, tol, at most so many products) to a correction of x and the products done.
        x: where to start.
        r: the residual there.
        tol: relative size to reach.
        max_iter: at most so many products.
        margin: where it starts again it aims at so much of tol, which the truth then meets.
    """
    iterations = 0
    best: tuple[Tensor, Tensor] | None = None
    while True:
        step, done = descend(r, tol if best is None else margin * tol, max_iter - iterations)
        iterations += done
        if done:
            x = x + step
            r = residual_of(x)
        residual, before = size_of(r), best
        if before is not None:  # a restart at the limit of rounding may lose a little
            x = torch.where(residual < before[1], x, before[0])
            residual = torch.minimum(residual, before[1])
        best = x, residual
        converged = bool((residual <= tol).all())
        stalled = done == 0 or (
            before is not None and not bool((residual <= before[1] / 2)[residual > tol].any())
        )
        if converged or stalled or iterations >= max_iter:
            short = not converged and iterations < max_iter
            return KrylovResult(x, iterations, residual, converged, short)
        r = residual_of(x)


def scaled(b: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Columns of norm one, or zero, and the norms (1, k) that they had, 1 for zero."""
    sizes = norms(b)
    require_finite(sizes, "the right-hand side", method)
    sizes = torch.where(sizes == 0, torch.ones_like(sizes), sizes)
    return b / sizes, sizes
