"""Warnings that point at the caller's code."""

from __future__ import annotations

import math
import sys
import warnings

import torch

from ..errors import ConvergenceWarning, EstimateWarning
from ..linalg import Eigenpairs, Estimate, KrylovResult, Triplets, default_tolerance

__all__ = [
    "falls_short",
    "warn",
    "warn_of_estimate",
    "warn_unless_converged",
    "warn_unless_resolved",
]


def warn(warning: Warning) -> None:
    """Warn at the first frame outside of this package."""
    warnings.warn(warning, stacklevel=_callers_level())


def warn_unless_converged(
    found: KrylovResult, tol: float | None, dtype: torch.dtype, method: str
) -> None:
    """A ConvergenceWarning if an iteration stopped short of its tolerance."""
    if found.converged:
        return
    worst = float(found.residual.max())
    tol = default_tolerance(dtype) if tol is None else tol
    advice = (
        f"rounding in {dtype} is the limit: add damping=, take float64 or raise tol="
        if found.stalled
        else "add damping=, pass a preconditioner= or a larger max_iter="
    )
    warn(
        ConvergenceWarning(
            f"{method} stopped at a relative residual of {worst:.2e} after {found.iterations} "
            f"iterations, short of tol={tol:.0e}: {advice}",
            worst,
            found.iterations,
        )
    )


def warn_unless_resolved(what: str, found: Eigenpairs | Triplets) -> None:
    """A ConvergenceWarning if pairs or triplets fall short of their tolerance."""
    if found.converged:
        return
    worst = float(found.residuals.max())
    size = float(found.values.abs().max())
    if found.interrupted:
        reason = f"was interrupted after {found.matvecs} products: these are the pairs so far"
    else:
        reason = (
            f"stopped after {found.matvecs} products, short of its tolerance: raise max_matvecs=, "
            "subspace= or tol=, or take float64 if rounding is the limit"
        )
    message = f"{what} {reason} (largest residual {worst:.2g}, largest value {size:.2g})"
    warn(ConvergenceWarning(message, worst / size if size else worst, found.matvecs))


def falls_short(found: Estimate, tol: float | None) -> bool:
    """Whether the standard error is larger than wanted."""
    wanted = math.inf if tol is None else tol * float(found.value.norm())
    return float(found.standard_error.norm()) > wanted


def warn_of_estimate(found: Estimate, what: str, tol: float | None) -> Estimate:
    """The estimate, with an EstimateWarning if it is not what was asked for."""
    error = float(found.standard_error.norm())
    if found.interrupted:
        reason = f"was interrupted after {found.matvecs} products: this is from what there was"
    elif found.bias > max(error, 1e-12 * abs(float(found.value.sum()))):
        reason = (
            f"has a quadrature that has not converged: it may be off by {found.bias:.2g}, and the "
            f"standard error is {error:.2g}; raise steps=, or add damping"
        )
    elif falls_short(found, tol):
        reason = (
            f"stopped at a standard error of {error:.2g} after {found.matvecs} products, short of "
            f"tol={tol:g}: raise max_matvecs="
        )
    else:
        return found
    warn(EstimateWarning(f"{what} {reason}", found))
    return found


def _callers_level() -> int:
    """The stacklevel of a warning that points at the code outside of this package."""
    own = (__name__.partition(".")[0], "torch", "linear_operator")
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(own):
        frame, level = frame.f_back, level + 1
    return level
