"""Options of the optimizers that take more than a number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from ..errors import DataError
from ..representations import Representation

__all__ = ["Damping", "HessianFree", "LevenbergMarquardt"]


@dataclass(frozen=True)
class LevenbergMarquardt:
    r"""Damping that follows how well the quadratic model predicts the loss.

    .. math:: \rho = \frac{\ell(w + \delta) - \ell(w)}{g^T \delta + \tfrac12 \delta^T F \delta}

    with delta the whole step, F the exact curvature of the step's batches and g their gradient: 1
    where the model is exact. Every `every` steps the damping is multiplied by `decay` ** `every`
    where rho is above `high`, and divided by it where rho is below `low`. Such a step takes one
    more evaluation of the closure, and a product with F. The ratio is one of the step's own batch:
    where that is small, it says little about the loss of all data.

    Args:
        initial: the damping to start with.
        every: steps between two adjustments.
        decay: of the damping over a single step.
        low: below it the damping grows.
        high: above it the damping shrinks.
        minimum: bound of the damping.
        maximum: likewise.

    Raises:
        DataError: bounds that are not in order, or a decay outside of (0, 1].

    Source:
        Martens and Grosse (2015), Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature, section 6.5; Levenberg (1944), Marquardt (1963), More (1978).
    """

    initial: float = 1.0
    every: int = 5
    decay: float = 0.95
    low: float = 0.25
    high: float = 0.75
    minimum: float = 1e-8
    maximum: float = 1e8

    def __post_init__(self) -> None:
        fits = 0 < self.minimum <= self.initial <= self.maximum and self.low < self.high
        if not fits or self.every < 1 or not 0 < self.decay <= 1:
            raise DataError(
                "expected 0 < minimum <= initial <= maximum, low < high, every >= 1 and a decay in "
                f"(0, 1], got {self}"
            )

    def adjusted(self, damping: float, ratio: float) -> float:
        """The damping after a step with this reduction ratio; NaN counts as a bad one.

        >>> LevenbergMarquardt(every=1, decay=0.5).adjusted(2.0, ratio=1.0)
        1.0
        """
        factor = self.decay**self.every
        if ratio > self.high:
            damping *= factor
        elif not ratio >= self.low:
            damping /= factor
        return min(max(damping, self.minimum), self.maximum)


@dataclass(frozen=True)
class HessianFree:
    """Conjugate gradients on the exact Gauss-Newton matrix of the step's batches.

    Nothing is averaged over steps, and the curvature is that of the model's own distribution, exact
    whatever the estimator is. An iteration starts where the last step's ended.

    Args:
        preconditioner: a structured representation, averaged over steps, that preconditions the
            iteration; None for none.
        tol: relative residual to stop at.
        max_iter: products at the most; an iteration is cut off there without a warning.
        decay: of the last step's solution as the start of this one's.

    Raises:
        DataError: a number out of its range.

    Source:
        Martens (2010), Deep learning via Hessian-free optimization.
    """

    preconditioner: str | Representation | None = None
    tol: float = 1e-2
    max_iter: int = 50
    decay: float = 0.95

    def __post_init__(self) -> None:
        if not (self.tol > 0 and self.max_iter >= 1 and 0 <= self.decay <= 1):
            raise DataError(f"expected tol > 0, max_iter >= 1 and a decay in [0, 1], got {self}")


Damping: TypeAlias = "float | Callable[[int], float] | LevenbergMarquardt"
