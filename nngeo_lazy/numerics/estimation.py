"""Traces, diagonals and log-determinants of any linear operator, exact or with their error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import linalg
from ..errors import NotPositiveDefiniteError, UnsupportedLayerError
from ..linalg import Estimate
from ..linalg.estimates import MIN_STEPS
from ..operators.base import BaseLinearOperator
from ..operators.convert import aslinearoperator
from ..operators.lazy import closed_forms_only
from ..operators.primitives import seeded
from ..operators.vectors import VectorLike, columns, flattened
from ..operators.warn import falls_short, warn_of_estimate, warn_unless_converged
from .spectra import require_symmetric_operator

__all__ = [
    "diagonal",
    "effective_dimension",
    "logdet",
    "matrix_function",
    "trace",
]

Function: TypeAlias = Callable[[Tensor], Tensor]

PROBES = 10  # of a quadrature, by default
TRACES = ("auto", "exact", "hutchinson", "hutch++", "xtrace", "slq")
DIAGONALS = ("auto", "exact", "hutchinson", "xdiag")


def trace(
    A: Any,
    function: Function | None = None,
    *,
    method: str = "auto",
    probes: int | None = None,
    steps: int = 100,
    tol: float | None = None,
    max_matvecs: int = 10_000,
    seed: int | None = None,
    progress: bool = False,
) -> Estimate:
    """The trace of an operator, or tr f(A) of a symmetric one.

    Exact, with error 0, where the structure knows it or the matrix has no more columns than
    products would be made. Else from random vectors. Without gradient.

    Args:
        A: an operator, a tensor, or whatever `aslinearoperator` takes.
        function: f, eigenvalues to their function, elementwise, such as `torch.exp`; by default the
            trace itself.
        method: "exact" (P products where the structure does not know), "hutchinson" (1 product a
            probe), "hutch++" (3) and "xtrace" (2), which are better by orders of magnitude where
            the spectrum decays, or "slq" (`steps` products), the one for a function; "auto" takes
            the closed form, else "xtrace" or "slq".
        probes: how many random vectors, at least 2; by default 30, for a function 10.
        steps: of Lanczos at most, for a function.
        tol: relative standard error to reach, by doubling the probes, and exactly where that
            would take more than P products; not for "hutch++".
        max_matvecs: at most so many products, with tol.
        seed: of the probes; by default from torch's global generator.
        progress: whether to show a bar.

    Returns:
        The estimate; with an `EstimateWarning` where a quadrature has not converged, tol was not
        reached, or it was interrupted.

    Raises:
        NotPositiveDefiniteError: the function is not finite on the spectrum.
        ValueError: an unknown method, a function of a matrix that is not symmetric, too few probes.

    Example:
        >>> float(trace(torch.diag(torch.tensor([1.0, 2.0])), torch.exp))  # e + e^2
        10.107...

    Source: Epperly, Tropp and Webber (2024), XTrace; Meyer et al. (2021), Hutch++; Ubaru, Chen and
        Saad (2017) for functions.
    """
    _require_method(method, TRACES)
    if function is not None:
        if method not in ("auto", "exact", "slq"):
            raise ValueError(f"a function needs method 'slq', got {method!r}")
        operator = require_symmetric_operator(A, "a function")
        options = (probes, steps, tol, max_matvecs, seed, progress)
        return _of_function(operator, function, "tr f(A)", method, *options)
    operator = aslinearoperator(A)
    operator._require_square("trace")
    if method == "slq":
        raise ValueError("method 'slq' is for a function=: take 'xtrace'")
    probes, n = 30 if probes is None else probes, operator.shape[-1]
    with torch.no_grad():
        if (exact := _exact(operator._trace, method)) is not None:
            return exact
        generator = seeded(seed, operator.device)
        common: dict[str, Any] = {"generator": generator, "progress": progress}
        if method == "hutchinson":
            common |= {"tol": tol, "max_matvecs": max_matvecs}
            found = linalg.hutchinson(operator._apply, n, probes, _like(operator), **common)
        elif (3 if method == "hutch++" else 2) * probes >= n:
            return Estimate(operator._trace(), _zero(operator), n)
        elif method == "hutch++":
            found = linalg.hutchpp(operator._apply, n, probes, _like(operator), **common)
        else:
            common |= {"tol": tol, "max_matvecs": max_matvecs}
            found = linalg.xtrace(operator._apply, n, probes, _like(operator), **common)
        found = _or_exact(found, operator._trace, n, tol, max_matvecs)
    return warn_of_estimate(found, "the trace", tol)


def diagonal(
    A: Any,
    *,
    method: str = "auto",
    probes: int = 30,
    tol: float | None = None,
    max_matvecs: int = 10_000,
    seed: int | None = None,
    progress: bool = False,
) -> Estimate:
    """The diagonal (P,) of an operator, with the standard error of each entry.

    Exact where the structure knows it or the matrix has no more columns than products would be
    made. Without gradient.

    Args:
        A: an operator, a tensor, or whatever `aslinearoperator` takes.
        method: "exact" (P products where the structure does not know), "hutchinson" (1 product a
            probe), "xdiag" (2; symmetric matrices); "auto" takes the closed form, else "xdiag".
        probes: how many random vectors, at least 2.
        tol: relative standard error to reach, in the 2-norm of the diagonal, as of `trace`.
        max_matvecs: at most so many products, with tol.
        seed: of the probes; by default from torch's global generator.
        progress: whether to show a bar.

    Returns:
        The estimate; with an `EstimateWarning` where tol was not reached or it was interrupted.

    Raises:
        ValueError: an unknown method, or too few probes.

    Example:
        >>> diagonal(torch.diag(torch.tensor([1.0, 2.0]))).value
        tensor([1., 2.])

    Source: Bekas, Kokiopoulou and Saad (2007); Epperly, Tropp and Webber (2024), section 3.
    """
    _require_method(method, DIAGONALS)
    operator = aslinearoperator(A)
    operator._require_square("diagonal")
    n = operator.shape[-1]
    with torch.no_grad():
        if (exact := _exact(operator._diagonal, method)) is not None:
            return exact
        options: dict[str, Any] = {"tol": tol, "max_matvecs": max_matvecs, "progress": progress}
        options["generator"] = seeded(seed, operator.device)
        if method == "hutchinson":
            options["diagonal"] = True
            found = linalg.hutchinson(operator._apply, n, probes, _like(operator), **options)
        elif 2 * probes >= n:
            value = operator._diagonal()
            return Estimate(value, torch.zeros_like(value), n)
        else:
            found = linalg.xdiag(operator._apply, n, probes, _like(operator), **options)
        found = _or_exact(found, operator._diagonal, n, tol, max_matvecs)
    return warn_of_estimate(found, "the diagonal", tol)


def logdet(
    A: Any,
    *,
    method: str = "auto",
    probes: int | None = None,
    steps: int = 100,
    tol: float | None = None,
    max_matvecs: int = 10_000,
    seed: int | None = None,
    progress: bool = False,
) -> Estimate:
    """The logarithm of the determinant of a positive definite operator.

    Exact where the structure knows it; else by stochastic Lanczos quadrature. Without gradient:
    `F.logdet()` has one.

    Args:
        A: an operator, a tensor, or whatever `aslinearoperator` takes.
        method: "exact", "slq"; "auto" takes the closed form where there is one.
        probes: how many random vectors, at least 2; 10 by default.
        steps: of Lanczos at most.
        tol: relative standard error to reach, by doubling the probes.
        max_matvecs: at most so many products, with tol.
        seed: of the probes; by default from torch's global generator.
        progress: whether to show a bar.

    Returns:
        The estimate; with an `EstimateWarning` where the quadrature has not converged, as at a
        large condition number, tol was not reached, or it was interrupted.

    Raises:
        NotPositiveDefiniteError: A has an eigenvalue that is not positive.

    Example:
        >>> float(logdet(torch.diag(torch.tensor([1.0, 2.0]))))
        0.693...

    Source: Ubaru, Chen and Saad (2017), Fast estimation of tr(f(A)) via stochastic Lanczos
        quadrature.
    """
    _require_method(method, ("auto", "exact", "slq"))
    operator = require_symmetric_operator(A, "logdet")
    with torch.no_grad():
        if method != "slq" and (exact := _exact(operator._logdet, "auto")) is not None:
            if bool(exact.value == -torch.inf):
                raise NotPositiveDefiniteError(
                    "logdet: the matrix is singular; add damping with F.damped(...)"
                )
            return exact
    options = (probes, steps, tol, max_matvecs, seed, progress)
    return _of_function(operator, torch.log, "logdet", method, *options)


def effective_dimension(
    A: Any,
    damping: float | Tensor,
    *,
    method: str = "auto",
    probes: int | None = None,
    steps: int = 100,
    tol: float | None = None,
    max_matvecs: int = 10_000,
    seed: int | None = None,
    progress: bool = False,
) -> Estimate:
    r"""How many directions a positive semidefinite operator has above the damping.

    .. math:: \operatorname{tr} A (A + d I)^{-1} = \sum_i \lambda_i / (\lambda_i + d)

    Exact where the structure knows the eigenvalues; else by stochastic Lanczos quadrature.

    Args:
        A: an operator, a tensor, or whatever `aslinearoperator` takes.
        damping: d > 0, a number.
        method: "exact", "slq"; "auto" takes the closed form where there is one.
        probes: how many random vectors, at least 2; 10 by default.
        steps: of Lanczos at most.
        tol: relative standard error to reach, by doubling the probes.
        max_matvecs: at most so many products, with tol.
        seed: of the probes; by default from torch's global generator.
        progress: whether to show a bar.

    Returns:
        The estimate, with warnings as of `logdet`.

    Raises:
        NotPositiveDefiniteError: A + d I has an eigenvalue that is not positive, or d is not.

    Example:
        >>> float(effective_dimension(torch.diag(torch.tensor([1.0, 3.0])), 1.0))
        1.25

    Source: Hastie, Tibshirani and Friedman (2009), The elements of statistical learning, eq. 3.50.
    """
    d = float(damping)
    if not d > 0:
        raise NotPositiveDefiniteError(f"effective_dimension: expected damping > 0, got {d}")
    _require_method(method, ("auto", "exact", "slq"))
    operator = require_symmetric_operator(A, "effective_dimension")

    def share(values: Tensor) -> Tensor:
        return torch.where(values + d > 0, values / (values + d), torch.nan)

    options = (probes, steps, tol, max_matvecs, seed, progress)
    return _of_function(operator, share, "the effective dimension", method, *options)


def matrix_function(
    A: Any,
    function: Function,
    v: VectorLike,
    *,
    tol: float | None = None,
    max_steps: int | None = None,
    progress: bool = False,
) -> Any:
    """f(A) v for a symmetric operator: square roots, inverse square roots, exponentials.

    In closed form where the structure has one; else by Lanczos, each column in its own Krylov
    space, which is held. Without gradient.

    Args:
        A: a symmetric operator, a tensor, or whatever `aslinearoperator` takes.
        function: f, eigenvalues to their function, elementwise, such as `torch.sqrt`.
        v: a vector, columns, or a dict by parameter name.
        tol: relative change to reach; by default 1e-6, in float64 1e-10.
        max_steps: at most so many products; by default P, at most 500.
        progress: whether to show a bar.

    Returns:
        f(A) v, of the form of v; where it has not converged, with a `ConvergenceWarning`.

    Raises:
        NotPositiveDefiniteError: the function is not finite on the spectrum, as a square root of a
            negative eigenvalue.

    Example:
        >>> matrix_function(torch.diag(torch.tensor([4.0, 9.0])), torch.sqrt, torch.ones(2))
        tensor([2., 3.])

    Source: Higham (2008), Functions of matrices, section 13.2.
    """
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
        applied = _evaluated(function, values, "f(A) v").unsqueeze(-1)
        return restore(basis._apply(applied * basis._transpose_nonbatch()._apply(b)))


def _of_function(
    operator: BaseLinearOperator,
    function: Function,
    what: str,
    method: str,
    probes: int | None,
    steps: int,
    tol: float | None,
    max_matvecs: int,
    seed: int | None,
    progress: bool,
) -> Estimate:
    with torch.no_grad():
        if method != "slq":
            try:
                values, _ = operator._eigensystem()
            except UnsupportedLayerError:
                if method == "exact":
                    raise
            else:
                return Estimate(_evaluated(function, values, what).sum(), _zero(operator), 0)
        probes, n = PROBES if probes is None else probes, operator.shape[-1]
        if method == "auto" and n <= probes * min(steps, MIN_STEPS):
            values = torch.linalg.eigvalsh(operator._dense().double())
            total = _evaluated(function, values, what, operator.dtype).sum()
            return Estimate(total.to(operator.dtype), _zero(operator), n)
        found = linalg.quadrature_trace(
            operator._apply,
            function,
            n,
            probes,
            steps,
            _like(operator),
            what=what,
            tol=tol,
            max_matvecs=max_matvecs,
            generator=seeded(seed, operator.device),
            progress=progress,
        )
    return warn_of_estimate(found, what, tol)


def _exact(known: Callable[[], Tensor], method: str) -> Estimate | None:
    """What the structure knows; with method "exact" at any price."""
    if method == "exact":
        value = known()
    elif method == "auto":
        try:
            with closed_forms_only():
                value = known()
        except UnsupportedLayerError:
            return None
    else:
        return None
    return Estimate(value, torch.zeros_like(value), 0)


def _or_exact(
    found: Estimate, known: Callable[[], Tensor], n: int, tol: float | None, max_matvecs: int
) -> Estimate:
    """The estimate; where it is short of tol after nearly n products, what n more make exact."""
    if found.interrupted or found.matvecs + n > max_matvecs or not falls_short(found, tol):
        return found
    value = known()
    return Estimate(value, torch.zeros_like(value), found.matvecs + n)


def _evaluated(
    function: Function, values: Tensor, what: str, dtype: torch.dtype | None = None
) -> Tensor:
    dtype = values.dtype if dtype is None else dtype
    ones = torch.ones_like(values)
    return linalg.evaluated(function, values, ones, values.abs().max(), dtype, what)


def _require_method(method: str, methods: tuple[str, ...]) -> None:
    if method not in methods:
        raise ValueError(f"expected method to be one of {list(methods)}, got {method!r}")


def _like(operator: BaseLinearOperator) -> Tensor:
    return torch.empty(0, dtype=operator.dtype, device=operator.device)


def _zero(operator: BaseLinearOperator) -> Tensor:
    return torch.zeros((), dtype=operator.dtype, device=operator.device)
