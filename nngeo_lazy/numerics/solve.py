"""`solve`: one call for any linear operator, with what the iteration found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import NotPositiveDefiniteError
from ..linalg import cg, lsmr, minres
from ..operators.base import BaseLinearOperator
from ..operators.convert import aslinearoperator
from ..operators.damping import DampingLike, is_zero
from ..operators.dense import MatrixLinearOperator
from ..operators.primitives import Krylov
from ..operators.vectors import VectorLike, columns, flattened, require_fitting
from ..operators.warn import warn_unless_converged

__all__ = ["METHODS", "Solution", "solve"]

METHODS = ("auto", "direct", "cg", "minres", "lsmr")


@dataclass(frozen=True)
class Solution:
    """What `solve` found.

    Attributes:
        x: the solution, of the same form as b.
        residual: |b - (A + damping) x| / |b| of each column (k,), as computed from x; for "lsmr"
            that of the normal equations.
        iterations: how many products the iteration took; 0 for a closed form.
        converged: whether every column has reached the tolerance.
        method: which method it was.
    """

    x: Any
    residual: Tensor
    iterations: int
    converged: bool
    method: str


def solve(
    A: Any,
    b: VectorLike,
    *,
    damping: DampingLike = 0.0,
    method: str = "auto",
    tol: float | None = None,
    max_iter: int | None = None,
    preconditioner: Any = None,
    x0: VectorLike | None = None,
) -> Solution:
    r"""Solve (A + damping) x = b for any linear operator A.

    Rectangular: the x that minimises |A x - b|^2 + damping |x|^2, which is
    (A^T A + damping) x = A^T b. Without gradient: `F.solve` is differentiable.

    Args:
        A: a tensor, a numpy array, a scipy or linear_operator operator, or one of this package.
        b: a vector, columns, or a dict by parameter name.
        damping: a float, a 0-d or (P,) tensor, or {selector: either}; a number for "lsmr".
        method: "direct" (closed form), "cg" (positive definite), "minres" (symmetric, indefinite or
            not), "lsmr" (rectangular, or not symmetric); "auto" takes "lsmr" for what is not
            square, the closed form where the structure has one, and otherwise "cg", or "minres"
            where that meets negative curvature.
        tol: relative residual to reach; by default 1e-6, in float64 1e-10.
        max_iter: at most so many products.
        preconditioner: an operator that approximates A (not its inverse), damped alike; for "cg"
            and "minres".
        x0: where to start, like x.

    Returns:
        The solution. Where it has not converged, with a `ConvergenceWarning`.

    Raises:
        NotPositiveDefiniteError: an indefinite A given to "cg", or such a preconditioner.
        SpaceMismatchError: b, x0 or the preconditioner does not fit.
        NonFiniteError: NaN or infinity in b or A.
        ValueError: an unknown method, or one that does not fit A.

    Example:
        >>> A = torch.diag(torch.tensor([-1.0, 2.0]))
        >>> found = solve(A, torch.ones(2), method="minres")
        >>> found.x, found.converged
        (tensor([-1.0000,  0.5000]), True)

    Source:
        Saad (2003), Iterative Methods for Sparse Linear Systems; Paige and Saunders (1975); Fong
        and Saunders (2011).
    """
    if method not in METHODS:
        raise ValueError(f"expected method to be one of {list(METHODS)}, got {method!r}")
    operator = aslinearoperator(A)
    with torch.no_grad():
        symmetric = operator.is_square and not isinstance(operator, MatrixLinearOperator)
        if method == "lsmr" or (method == "auto" and not symmetric):
            if preconditioner is not None:
                raise ValueError("method 'lsmr' takes no preconditioner=")
            return _least_squares(operator, b, damping, tol, max_iter, x0)
        if not symmetric:
            kind = "one that is not symmetric" if operator.is_square else tuple(operator.shape)
            raise ValueError(f"method {method!r} needs a symmetric matrix, got {kind}: take 'lsmr'")
        return _square(operator, b, damping, method, tol, max_iter, preconditioner, x0)


def _square(
    operator: BaseLinearOperator,
    b: VectorLike,
    damping: DampingLike,
    method: str,
    tol: float | None,
    max_iter: int | None,
    preconditioner: Any,
    x0: VectorLike | None,
) -> Solution:
    damped = operator if is_zero(damping) else operator.damped(damping)
    v, restore = columns(damped, b)
    close = None
    if preconditioner is not None:
        approximation = require_fitting(aslinearoperator(preconditioner), operator)
        close = approximation if is_zero(damping) else approximation.damped(damping)
    if method == "direct" or (method == "auto" and not damped.iterates):
        if damped.iterates:
            raise ValueError(
                f"method 'direct' needs a closed form, which {type(damped).__name__} has not: take "
                "'auto', 'cg' or 'minres'"
            )
        x = damped._solve(v, krylov=Krylov(tol, max_iter))
        residual = _residual(damped, x, v)
        return Solution(restore(x), residual, 0, True, "direct")
    krylov = Krylov(tol, max_iter, close, None if x0 is None else columns(damped, x0)[0])
    if method == "minres":
        return _iterated("minres", damped, v, restore, krylov)
    try:
        return _iterated("cg", damped, v, restore, krylov)
    except NotPositiveDefiniteError as error:
        if method == "cg" or "preconditioner" in str(error):
            raise
        return _iterated("minres", damped, v, restore, krylov)


def _iterated(
    method: str, A: BaseLinearOperator, v: Tensor, restore: Any, krylov: Krylov
) -> Solution:
    b, back = flattened(v)
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
            raise ValueError("method 'lsmr' takes a number as damping=")
        damping = float(damping)
    transposed = A._transpose_nonbatch()
    v = columns(transposed, b)[0]
    start = None if x0 is None else columns(A, x0)[0]
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


def _residual(A: BaseLinearOperator, x: Tensor, b: Tensor) -> Tensor:
    """|b - A x| / |b| of each column, 0 where b is 0."""
    wide, _ = flattened(b)
    left, _ = flattened(b - A._apply(x))
    norms = wide.norm(dim=0)
    relative: Tensor = left.norm(dim=0) / torch.where(norms == 0, 1.0, norms)
    return relative
