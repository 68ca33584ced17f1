"""Traces, diagonals and log-determinants of any linear operator, each with its error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from .. import linalg
from ..arguments import checked, described, require_takes
from ..errors import DataError, NotPositiveDefiniteError, UnsupportedLayerError, wrong_option
from ..linalg import Estimate, Probes
from ..linalg.estimates import MIN_STEPS, PROBES, QUADRATURES, STEPS
from ..operators.base import BaseLinearOperator
from ..operators.convert import aslinearoperator
from ..operators.damping import DampingAmount
from ..operators.lazy import closed_forms_only
from ..operators.warn import falls_short, warn_of_estimate
from ..precision import widened
from .functions import Function, evaluated
from .spectra import _like, require_symmetric_operator

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["diagonal", "effective_dimension", "logdet", "trace"]

TRACES = ("auto", "exact", "hutchinson", "hutch++", "xtrace", "slq")
DIAGONALS = ("auto", "exact", "hutchinson", "xdiag")
FUNCTIONS = ("auto", "exact", "slq")


class DiagonalOptions(TypedDict, total=False):
    """Keywords of `diagonal` that are fields of `Probes`."""

    tol: float | None
    max_matvecs: int
    progress: bool


class Options(DiagonalOptions, total=False):
    """Keywords of the other functions that are fields of `Probes`."""

    steps: int


@checked
def trace(
    A: Any,
    function: Function | None = None,
    *,
    method: str = "auto",
    probes: int | Probes | None = None,
    seed: int | None = None,
    **options: Unpack[Options],
) -> Estimate:
    r"""The trace of an operator, or tr f(A) of a symmetric one.

    .. math:: \operatorname{tr} f(A) = \sum_i f(\lambda_i)

    It is exact, with standard error 0, if the structure knows it, or if the exact value takes no
    more products than the estimate. Otherwise it is estimated from random vectors. It has no
    gradient.

    Args:
        A: a square operator (P x P), a tensor, or anything that `aslinearoperator` takes.
        function: f, eigenvalues to their function, elementwise, such as `torch.exp`; by default the
            trace of A itself.
        method: "exact" takes P products if the structure does not know the trace. "hutchinson"
            takes 1 product for each probe, "xtrace" 2 and "hutch++" 3; these two are better by
            orders of magnitude if the spectrum decays. "slq", for a function, takes `steps`
            products. "auto" takes the closed form, else "xtrace", for a function "slq".
        probes: how many random vectors, at least 2, by default 30, for a function 10; or a `Probes`
            object, which holds all options below.
        seed: of the random vectors; by default they come from torch's global generator.
        **options: `steps`, `tol`, `max_matvecs` and `progress`, as of `Probes`. If `tol` would take
            more than P products, the value is exact; "hutch++" takes no `tol`.

    Returns:
        The tuple (value, standard_error, matvecs). If the quadrature has not converged, `tol` was
        not reached or the user interrupted the call, an `EstimateWarning` says so.

    Raises:
        NotPositiveDefiniteError: the function is not finite on the spectrum.
        ValueError: the method is unknown or takes no such option, there are too few probes, or the
            matrix of a function is not symmetric.
        DataError: an option is out of range, or a `Probes` object is given beside keywords.
        TypeError: an unknown option.

    Example:
        >>> float(trace(torch.diag(torch.tensor([1.0, 2.0])), torch.exp))  # e + e^2
        10.107...

    Source: Epperly, Tropp and Webber (2024), XTrace; Meyer et al. (2021), Hutch++; Ubaru, Chen and
        Saad (2017) for functions.
    """
    _require_method(method, TRACES)
    given = Probes.of("trace", probes, seed=seed, **options)
    require_takes("function", function, "eigenvalues")
    if function is not None:
        if method not in FUNCTIONS:
            raise ValueError(f"a function needs method 'slq', got {method!r}")
        operator = require_symmetric_operator(A, "a function", look=True)
        return _of_function(operator, function, "tr f(A)", method, given)
    operator = aslinearoperator(A)
    operator._require_square("trace")
    if method == "slq":
        raise ValueError("method 'slq' is for a function=: take 'xtrace'")
    if method == "hutch++" and given.tol is not None:
        raise ValueError("method 'hutch++' takes no tol=: take 'xtrace', or leave it out")
    estimate, cost = {
        "hutchinson": (linalg.hutchinson, 1),
        "hutch++": (linalg.hutchpp, 3),
    }.get(method, (linalg.xtrace, 2))
    n = operator.shape[-1]
    with torch.no_grad():
        if (exact := _exact(operator._trace, method)) is not None:
            return exact
        if cost > 1 and cost * (given.probes or PROBES) >= n:
            return Estimate(operator._trace(), _zero(operator), n)
        found = estimate(operator._apply, n, _like(operator), given)
        found = _or_exact(found, operator._trace, n, given)
    return warn_of_estimate(found, "the trace", given.tol)


@checked
def diagonal(
    A: Any,
    *,
    method: str = "auto",
    probes: int | Probes | None = None,
    seed: int | None = None,
    **options: Unpack[DiagonalOptions],
) -> Estimate:
    """The diagonal (P,) of an operator, with the standard error of each entry.

    It is exact, with standard error 0, if the structure knows it, or if the exact value takes no
    more products than the estimate. Otherwise it is estimated from random vectors. It has no
    gradient.

    Args:
        A: a square operator (P x P), a tensor, or anything that `aslinearoperator` takes.
        method: "exact" takes P products if the structure does not know the diagonal. "hutchinson"
            takes 1 product for each probe, "xdiag", for symmetric matrices, 2. "auto" takes the
            closed form, else "xdiag".
        probes: how many random vectors, at least 2, by default 30; or a `Probes` object, which
            holds all options below.
        seed: of the random vectors; by default they come from torch's global generator.
        **options: `tol`, in the 2-norm of the diagonal, `max_matvecs` and `progress`, as of
            `Probes`.

    Returns:
        The tuple (value, standard_error, matvecs), two tensors (P,) and a number. If `tol` was not
        reached or the user interrupted the call, an `EstimateWarning` says so.

    Raises:
        ValueError: the method is unknown, or there are too few probes.
        DataError: an option is out of range, or a `Probes` object is given beside keywords.
        TypeError: an unknown option.

    Example:
        >>> diagonal(torch.diag(torch.tensor([1.0, 2.0]))).value
        tensor([1., 2.])

    Source: Bekas, Kokiopoulou and Saad (2007), An estimator for the diagonal of a matrix; Epperly,
        Tropp and Webber (2024), XTrace, section 3.
    """
    _require_method(method, DIAGONALS)
    given = Probes.of("diagonal", probes, ("steps",), seed=seed, **options)
    operator = aslinearoperator(A)
    operator._require_square("diagonal")
    n = operator.shape[-1]
    with torch.no_grad():
        if (exact := _exact(operator._diagonal, method)) is not None:
            return exact
        if method == "hutchinson":
            found = linalg.hutchinson(operator._apply, n, _like(operator), given, diagonal=True)
        elif 2 * (given.probes or PROBES) >= n:
            value = operator._diagonal()
            return Estimate(value, torch.zeros_like(value), n)
        else:
            found = linalg.xdiag(operator._apply, n, _like(operator), given)
        found = _or_exact(found, operator._diagonal, n, given)
    return warn_of_estimate(found, "the diagonal", given.tol)


@checked
def logdet(
    A: Any,
    *,
    method: str = "auto",
    probes: int | Probes | None = None,
    seed: int | None = None,
    **options: Unpack[Options],
) -> Estimate:
    r"""The natural logarithm of the determinant of a positive definite operator.

    .. math:: \log\det A = \operatorname{tr} \log A = \sum_i \log \lambda_i

    It is exact if the structure knows it, or if A is small. Otherwise it is estimated by stochastic
    Lanczos quadrature. It has no gradient; `F.logdet()` has one.

    Args:
        A: a symmetric operator (P x P), a tensor, or anything that `aslinearoperator` takes.
        method: "exact" or "slq"; "auto" takes the closed form if there is one.
        probes: how many random vectors, at least 2, by default 10; or a `Probes` object, which
            holds all options below.
        seed: of the random vectors; by default they come from torch's global generator.
        **options: `steps`, `tol`, `max_matvecs` and `progress`, as of `Probes`.

    Returns:
        The tuple (value, standard_error, matvecs). If the quadrature has not converged (as at a
        large condition number), `tol` was not reached or the user interrupted the call, an
        `EstimateWarning` says so.

    Raises:
        NotPositiveDefiniteError: A has an eigenvalue that is not positive.
        UnsupportedLayerError: the method is "exact", and the structure has no closed form.
        ValueError: the method is unknown, there are too few probes, or A is not symmetric.
        DataError: an option is out of range, or a `Probes` object is given beside keywords.
        TypeError: an unknown option.

    Example:
        >>> float(logdet(torch.diag(torch.tensor([1.0, 2.0]))))
        0.693...

    Source: Ubaru, Chen and Saad (2017), Fast estimation of tr(f(A)) via stochastic Lanczos
        quadrature.
    """
    _require_method(method, FUNCTIONS)
    given = Probes.of("logdet", probes, seed=seed, **options)
    operator = require_symmetric_operator(A, "logdet", look=True)
    with torch.no_grad():
        if method != "slq" and (exact := _exact(operator._logdet, "auto")) is not None:
            if bool(exact.value == -torch.inf):
                raise NotPositiveDefiniteError(
                    "logdet: the matrix is singular; add damping with F.damped(...)"
                )
            return exact
    return _of_function(operator, torch.log, "logdet", method, given)


@checked
def effective_dimension(
    A: Any,
    damping: DampingAmount,
    *,
    method: str = "auto",
    probes: int | Probes | None = None,
    seed: int | None = None,
    **options: Unpack[Options],
) -> Estimate:
    r"""How many directions of a positive semidefinite operator have eigenvalues above the damping.

    .. math:: \operatorname{tr} A (A + d I)^{-1} = \sum_i \lambda_i / (\lambda_i + d)

    It is exact if the structure knows the eigenvalues, or if A is small. Otherwise it is estimated
    by stochastic Lanczos quadrature. It has no gradient.

    Args:
        A: a symmetric operator (P x P), a tensor, or anything that `aslinearoperator` takes.
        damping: d > 0, a number in the units of A.
        method: "exact" or "slq"; "auto" takes the closed form if there is one.
        probes: how many random vectors, at least 2, by default 10; or a `Probes` object, which
            holds all options below.
        seed: of the random vectors; by default they come from torch's global generator.
        **options: `steps`, `tol`, `max_matvecs` and `progress`, as of `Probes`.

    Returns:
        The tuple (value, standard_error, matvecs), a number of directions from 0 to P. Warnings
        are those of `logdet`.

    Raises:
        NotPositiveDefiniteError: A + d I has an eigenvalue that is not positive, or d is not.
        UnsupportedLayerError: the method is "exact", and the structure has no closed form.
        ValueError: the method is unknown, there are too few probes, or A is not symmetric.
        DataError: an option is out of range, or a `Probes` object is given beside keywords.
        TypeError: an unknown option.

    Example:
        >>> float(effective_dimension(torch.diag(torch.tensor([1.0, 3.0])), 1.0))
        1.25

    Source: Hastie, Tibshirani and Friedman (2009), The elements of statistical learning, eq. 3.50.
    """
    if isinstance(damping, Tensor) and damping.dim() > 0:
        raise DataError(
            f"expected damping to be one number, got {described(damping)}: pass a float"
        )
    d = float(damping)
    if not d > 0:
        raise NotPositiveDefiniteError(f"effective_dimension: expected damping > 0, got {d}")
    _require_method(method, FUNCTIONS)
    given = Probes.of("effective_dimension", probes, seed=seed, **options)
    operator = require_symmetric_operator(A, "effective_dimension", look=True)

    def share(values: Tensor) -> Tensor:
        return torch.where(values + d > 0, values / (values + d), torch.nan)

    return _of_function(operator, share, "the effective dimension", method, given)


def _of_function(
    operator: BaseLinearOperator, function: Function, what: str, method: str, options: Probes
) -> Estimate:
    """tr f(A): of the eigenvalues if the structure or the size allows, else by quadrature."""
    with torch.no_grad():
        if method != "slq":
            try:
                values, _ = operator._eigensystem()
            except UnsupportedLayerError:
                if method == "exact":
                    raise
            else:
                return Estimate(evaluated(function, values, what).sum(), _zero(operator), 0)
        steps, n = options.steps or STEPS, operator.shape[-1]
        if method == "auto" and n <= (options.probes or QUADRATURES) * min(steps, MIN_STEPS):
            values = torch.linalg.eigvalsh(widened(operator._dense()))
            total = evaluated(function, values, what, operator.dtype).sum()
            return Estimate(total.to(operator.dtype), _zero(operator), n)
        found = linalg.quadrature_trace(
            operator._apply, function, n, _like(operator), options, what=what
        )
    return warn_of_estimate(found, what, options.tol)


def _exact(known: Callable[[], Tensor], method: str) -> Estimate | None:
    """The exact value if the structure knows it; for the method "exact", by P products if not."""
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


def _or_exact(found: Estimate, known: Callable[[], Tensor], n: int, options: Probes) -> Estimate:
    """The estimate; if it is short of tol and n more products are allowed, the exact value."""
    allowed = found.matvecs + n <= options.max_matvecs
    if found.interrupted or not allowed or not falls_short(found, options.tol):
        return found
    value = known()
    return Estimate(value, torch.zeros_like(value), found.matvecs + n)


def _require_method(method: str, methods: tuple[str, ...]) -> None:
    if method not in methods:
        raise ValueError(wrong_option("method", method, methods, "spectra"))


def _zero(operator: BaseLinearOperator) -> Tensor:
    return torch.zeros((), dtype=operator.dtype, device=operator.device)
