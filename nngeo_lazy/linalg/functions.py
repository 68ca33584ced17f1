"""Functions of a symmetric matrix times vectors, by Lanczos."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .krylov import KrylovResult, Matvec, default_tolerance
from .lanczos import Lanczos
from .products import Products

__all__ = ["matrix_function"]


def matrix_function(
    matvec: Matvec,
    f: Callable[[Tensor], Tensor],
    v: Tensor,
    *,
    tol: float | None = None,
    max_steps: int | None = None,
    progress: bool = False,
) -> KrylovResult:
    """f(A) v for a symmetric A, as |v| V f(T) e_1 with the Lanczos vectors V of v.

    It ends when the last tenth of the steps has changed the result by less than the tolerance. All
    Lanczos vectors are held.

    Args:
        matvec: v (n, k) to A v.
        f: eigenvalues to their function, elementwise.
        v: (n, k).
        tol: relative change to reach; 1e-6 in float32, 1e-10 in float64.
        max_steps: at most so many; by default n, at most 500.
        progress: whether to show a progress bar.

    Returns:
        x = f(A) v, with the relative change of each column as `residual`.

    Raises:
        NotPositiveDefiniteError: f is not finite on the spectrum.
        NonFiniteError: NaN or infinity in a product.

    Example:
        >>> import torch
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
        >>> v = torch.ones(3, 1, dtype=torch.float64)
        >>> matrix_function(lambda v: A @ v, torch.square, v).x.mT
        tensor([[ 1.0000,  4.0000, 25.0000]], dtype=torch.float64)

    Source: Higham (2008), Functions of matrices, section 13.2.
    """
    tol = default_tolerance(v.dtype) if tol is None else tol
    max_steps = min(len(v), 500) if max_steps is None else max_steps
    with Products(matvec, "f(A) v", progress=progress) as products:
        run = Lanczos(products, v, max_steps, reorthogonalize=True, method="f(A) v")
        last: Tensor | None = None
        change = torch.full((v.shape[1],), torch.inf, dtype=torch.float64, device="cpu")
        following = 4
        while not run.finished and not bool((change <= tol).all()):
            run.step()
            if run.steps < following and not run.finished:
                continue
            following = run.steps + max(2, run.steps // 10)
            y = run.coefficients(f)
            if last is not None:
                size = torch.linalg.vector_norm(y, dim=1)
                moved = y.clone()
                moved[:, : last.shape[1]] -= last
                moved = torch.linalg.vector_norm(moved, dim=1)
                change = moved / torch.where(size == 0, 1.0, size)
            last = y
        x = torch.zeros_like(v) if last is None else run.combined(last)
    exact = run.steps == len(v) or not bool(run.live.any())
    converged = exact or bool((change <= tol).all())
    residual = torch.zeros_like(change) if exact else change
    return KrylovResult(x, run.steps, residual.to(v), converged)
