"""`solve`: one call for any linear operator; the result says how good it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import NonNegativeInt, checked
from ..errors import NotPositiveDefiniteError, wrong_option
from ..linalg import (
    IndefinitePreconditionerError,
    KrylovResult,
    cg,
    default_tolerance,
    lsmr,
    minres,
)
from ..operators.base import BaseLinearOperator
from ..operators.convert import aslinearoperator
from ..operators.damping import DampingLike, is_zero
from ..operators.dense import MatrixLinearOperator
from ..operators.lazy import require_symmetric
from ..operators.primitives import Krylov
from ..operators.vectors import VectorLike, columns, flattened, require_fitting, start_of
from ..operators.warn import warn_unless_converged
from .results import Solution

__all__ = ["METHODS", "solve"]

METHODS = ("auto", "direct", "cg", "minres", "lsmr")


@checked
def solve(
    A: Any,
    b: VectorLike,
    *,
    damping: DampingLike = 0.0,
    method: str = "auto",
    tol: float | None = None,
    max_iter: NonNegativeInt | None = None,
    preconditioner: Any = None,
    x0: VectorLike | None = None,
) -> Solution:
    r"""Solve (A + damping) x = b for any linear operator A.

    If A is rectangular or not symmetric, x minimises |A x - b|^2 + damping |x|^2, so that
    (A^T A + damping) x = A^T b. The result has no gradient; `F.solve` has one.

    Args:
        A: an operator (m x n), a tensor, or anything that `aslinearoperator` takes.
        b: a vector (m,), columns (m, k), or a dict by parameter name.
        damping: a float, a 0-d or (n,) tensor, or {selector: either}; for "lsmr" a number. It has
            the units of A, for "lsmr" those of A^T A.
        method: "direct" (a closed form), "cg" (A positive definite), "minres" (A symmetric),
            "lsmr" (any A). "auto" takes "lsmr" if A is rectangular, or a tensor that is not
            symmetric, the closed form if the structure has one, and otherwise "cg", then "minres"
            if "cg" meets negative curvature.
        tol: relative residual to reach; by default 1e-6, in float64 1e-10.
        max_iter: at most so many iterations.
        preconditioner: an operator that approximates A (not its inverse) and is damped alike; for
            "cg" and "minres".
        x0: where to start, in the form of x.

    Returns:
        The tuple (x, residual, iterations, converged), x in the form of b. If it has not converged,
        a `ConvergenceWarning` says so.

    Raises:
        NotPositiveDefiniteError: "cg" was given an indefinite A or preconditioner.
        SpaceMismatchError: b, x0 or the preconditioner does not fit A.
        NonFiniteError: NaN or infinity in b or A.
        ValueError: the method is unknown or does not fit A.

    Example:
        >>> A = torch.diag(torch.tensor([-1.0, 2.0]))
        >>> found = solve(A, torch.ones(2), method="minres")
        >>> found.x, found.converged
        (tensor([-1.0000,  0.5000]), True)

    Source: Saad (2003), Iterative methods for sparse linear systems; Paige and Saunders (1975) for
        MINRES; Fong and Saunders (2011) for LSMR.
    """
    if method not in METHODS:
        raise ValueError(wrong_option("method", method, METHODS, "matrix_free"))
    operator = aslinearoperator(A)
    with torch.no_grad():
        symmetric = operator.is_square and not isinstance(operator, MatrixLinearOperator)
        if method == "lsmr" or (method == "auto" and not symmetric):
            if preconditioner is not None:
                raise ValueError("method 'lsmr' takes no preconditioner=: leave it out")
            return _least_squares(operator, b, damping, tol, max_iter, x0)
        if not symmetric:
            kind = "one that is not symmetric" if operator.is_square else tuple(operator.shape)
            raise ValueError(f"method {method!r} needs a symmetric matrix, got {kind}: take 'lsmr'")
        undamped = is_zero(damping)
        damped = operator if undamped else operator.damped(damping)
        close = None
        if preconditioner is not None:
            approximation = require_fitting(aslinearoperator(preconditioner), operator)
            close = approximation if undamped else approximation.damped(damping)
        start = None if x0 is None else start_of(damped, x0, columns(damped, b)[0])
        return _square(damped, b, method, Krylov(tol, max_iter, close, start))


def _square(damped: BaseLinearOperator, b: VectorLike, method: str, krylov: Krylov) -> Solution:
    v, restore = columns(damped, b)
    if method == "direct" or (method == "auto" and not damped.iterates):
        if damped.iterates:
            raise ValueError(
                f"method 'direct' needs a closed form, and {type(damped).__name__} has none: take "
                "'auto', 'cg' or 'minres'"
            )
        x = damped._solve(v, krylov=Krylov(krylov.tol, krylov.max_iter))
        x, residual = _checked(damped, x, v, krylov)
        found = KrylovResult(x, 0, residual, _within(residual, krylov, v.dtype), stalled=True)
        warn_unless_converged(found, krylov.tol, v.dtype, "the closed form")
        return Solution(restore(x), residual, 0, found.converged, "direct")
    if method == "minres":
        return _iterated("minres", damped, v, restore, krylov)
    try:
        return _iterated("cg", damped, v, restore, krylov)
    except NotPositiveDefiniteError as error:
        if method == "cg" or isinstance(error, IndefinitePreconditionerError):
            raise
        return _iterated("minres", damped, v, restore, krylov)


def _iterated(
    method: str, A: BaseLinearOperator, v: Tensor, restore: Any, krylov: Krylov
) -> Solution:
    b, back = flattened(v)
    require_symmetric(A, b)
    x0 = None if krylov.x0 is None else flattened(krylov.x0.expand(v.shape))[0]
    close = krylov.preconditioner
    run = cg if method == "cg" else minres
    found = run(
        A._apply,
        b,
        tol=krylov.tol,
        max_iter=krylov.max_iter,
        preconditioner=None if close is None else lambda r: close._solve(r),
        x0=x0,
    )
    warn_unless_converged(found, krylov.tol, b.dtype, _NAMES[method])
    return Solution(
        restore(back(found.x)), found.residual, found.iterations, found.converged, method
    )


_NAMES = {"cg": "conjugate gradients", "minres": "minimal residuals", "lsmr": "least squares"}


def _least_squares(
    A: BaseLinearOperator,
    b: VectorLike,
    damping: DampingLike,
    tol: float | None,
    max_iter: int | None,
    x0: VectorLike | None,
) -> Solution:
    if not isinstance(damping, (int, float)):
        if not isinstance(damping, Tensor) or damping.dim() > 0:
            raise ValueError(
                f"method 'lsmr' takes a number as damping=, got {type(damping).__name__}: take a "
                "float or a 0-d tensor"
            )
        damping = float(damping)
    transposed = A._transpose_nonbatch()
    v = columns(transposed, b)[0]
    start = None if x0 is None else start_of(A, x0, v)
    b_, back = flattened(v)
    found = lsmr(
        A._apply,
        transposed._apply,
        b_,
        damping=float(damping),
        tol=tol,
        max_iter=max_iter,
        x0=None if start is None else flattened(start)[0],
    )
    warn_unless_converged(found, tol, b_.dtype, _NAMES["lsmr"])
    x = back(found.x)
    x = x.squeeze(-1) if isinstance(b, Tensor) and b.dim() == 1 else x
    return Solution(x, found.residual, found.iterations, found.converged, "lsmr")


def _within(residual: Tensor, krylov: Krylov, dtype: torch.dtype) -> bool:
    tol = default_tolerance(dtype) if krylov.tol is None else krylov.tol
    return bool((residual <= tol).all())  # NaN is not


def _checked(A: BaseLinearOperator, x: Tensor, b: Tensor, krylov: Krylov) -> tuple[Tensor, Tensor]:
    """A closed form's x with its residual, refined once if that is above the tolerance."""
    residual = _residual(A, x, b)
    if _within(residual, krylov, b.dtype) or not bool(x.isfinite().all()):
        return x, residual
    better = x + A._solve(b - A._apply(x), krylov=Krylov(krylov.tol, krylov.max_iter))
    of_better = _residual(A, better, b)
    if float(of_better.max()) < float(residual.max()):
        return better, of_better
    return x, residual


def _residual(A: BaseLinearOperator, x: Tensor, b: Tensor) -> Tensor:
    """|b - A x| / |b| of each column (k,), 0 for a zero column."""
    wide, _ = flattened(b)
    left, _ = flattened(b - A._apply(x))
    norms = wide.norm(dim=0)
    relative: Tensor = left.norm(dim=0) / torch.where(norms == 0, 1.0, norms)
    return relative
