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
    "seeded",
]

Matvec: TypeAlias = Callable[[Tensor], Tensor]


class IndefinitePreconditionerError(NotPositiveDefiniteError):
    """The preconditioner, and not the matrix, is not positive definite."""


@dataclass(frozen=True)
class KrylovResult:
    """What an iteration found.

    Attributes:
        x: the solution (n, k).
        iterations: how many iterations were done, each of one product with A.
        residual: the true relative residual |b - A x| / |b| of each column (k,), 0 for a zero
            column; for least squares, that of the normal equations.
        converged: whether every column has reached the tolerance.
        stalled: whether it stopped because rounding keeps the residual above the tolerance.

    Example:
        >>> KrylovResult(torch.ones(2, 1), 3, torch.tensor([1e-7]), True).converged
        True
    """

    x: Tensor
    iterations: int
    residual: Tensor
    converged: bool
    stalled: bool = False


def default_tolerance(dtype: torch.dtype) -> float:
    """The default of a relative residual: 1e-10 in float64, else 1e-6.

    Args:
        dtype: of the vectors.

    Returns:
        The relative residual.

    Example:
        >>> default_tolerance(torch.float64)
        1e-10
    """
    return 1e-10 if dtype == torch.float64 else 1e-6


def seeded(seed: int | None, device: torch.device) -> torch.Generator | None:
    """A new generator with the seed; None, torch's global one, without a seed."""
    return None if seed is None else torch.Generator(device).manual_seed(seed)


def norms(v: Tensor) -> Tensor:
    """Column norms (1, k) that neither overflow nor underflow.

    `sum` adds pairwise. `torch.linalg.vector_norm` does not: for a million float32 numbers it is
    wrong by 2e-4, and so would be the eigenvalues from vectors of that length.
    """
    scale = v.abs().amax(0, keepdim=True)
    safe = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
    return (v / safe).square().sum(0, keepdim=True).sqrt() * safe


def require_finite(sizes: Tensor, what: str, method: str) -> None:
    """Raise NonFiniteError if the norm of a column is not finite."""
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

    The recurrence of an iteration drifts from the truth. If it says that it has converged, the true
    residual is computed. If that is too large, the iteration starts again from the current x.

    Args:
        residual_of: x (n, k) to the true residual r.
        size_of: r to its relative size (k,).
        descend: (r, tol, most) to a correction of x, and the number of iterations, at most `most`.
        x: the start.
        r: the residual of the start.
        tol: relative size to reach.
        max_iter: at most so many iterations.
        margin: a further descent aims at margin * tol, so that the true residual reaches tol.
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
    """The columns divided by their norms, and these norms (1, k); a zero column has norm 1."""
    sizes = norms(b)
    require_finite(sizes, "the right-hand side", method)
    sizes = torch.where(sizes == 0, torch.ones_like(sizes), sizes)
    return b / sizes, sizes
