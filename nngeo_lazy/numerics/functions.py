"""Functions of a symmetric operator times vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import linalg
from ..arguments import PositiveInt, checked, require_takes
from ..errors import UnsupportedLayerError
from ..operators.vectors import VectorLike, columns, flattened
from ..operators.warn import warn_unless_converged
from .spectra import require_symmetric_operator

__all__ = ["Function", "evaluated", "matrix_function"]

Function: TypeAlias = Callable[[Tensor], Tensor]


@checked
def matrix_function(
    A: Any,
    function: Function,
    v: VectorLike,
    *,
    tol: float | None = None,
    max_steps: PositiveInt | None = None,
    progress: bool = False,
) -> Any:
    r"""f(A) v for a symmetric operator, such as a square root, its inverse or an exponential.

    .. math:: f(A)\, v = \sum_i f(\lambda_i)\, u_i u_i^T v

    Structures with a closed form use it. All others use Lanczos; each column has a Krylov space of
    its own, whose vectors are held. The result has no gradient.

    Args:
        A: a symmetric operator (P x P), a tensor, or anything that `aslinearoperator` takes.
        function: f, eigenvalues to their function, elementwise, such as `torch.sqrt`.
        v: a vector (P,), columns (P, k), or a dict by parameter name.
        tol: relative change of a column to reach; by default 1e-6, in float64 1e-10.
        max_steps: at most so many products for each column; by default P, at most 500.
        progress: whether to show a progress bar.

    Returns:
        f(A) v, in the form of v. If it has not converged, a `ConvergenceWarning` says so.

    Raises:
        NotPositiveDefiniteError: the function is not finite on the spectrum, such as the square
            root of a negative eigenvalue.
        SpaceMismatchError: v does not fit A.
        ValueError: A is not symmetric.

    Example:
        >>> matrix_function(torch.diag(torch.tensor([4.0, 9.0])), torch.sqrt, torch.ones(2))
        tensor([2., 3.])

    Source: Higham (2008), Functions of matrices, section 13.2.
    """
    require_takes("function", function, "eigenvalues")
    operator = require_symmetric_operator(A, "matrix_function")
    with torch.no_grad():
        b, restore = columns(operator, v)
        try:
            values, basis = operator._eigensystem()
        except UnsupportedLayerError:  # no closed form
            wide, back = flattened(b)
            options: dict[str, Any] = {"tol": tol, "max_steps": max_steps, "progress": progress}
            found = linalg.matrix_function(operator._apply, function, wide, **options)
            warn_unless_converged(found, tol, wide.dtype, "f(A) v")
            return restore(back(found.x))
        applied = evaluated(function, values, "f(A) v").unsqueeze(-1)
        return restore(basis._apply(applied * basis._transpose_nonbatch()._apply(b)))


def evaluated(
    function: Function, values: Tensor, what: str, dtype: torch.dtype | None = None
) -> Tensor:
    """f of all eigenvalues; rounding is that of `dtype`, by default of the eigenvalues' own.

    Raises:
        NotPositiveDefiniteError: f is not finite at one of them.
    """
    dtype = values.dtype if dtype is None else dtype
    ones = torch.ones_like(values)
    return linalg.evaluated(function, values, ones, values.abs().max(), dtype, what)
